"""The folder that samples are written into: it says what went in, can be continued, and never holds half a file.

``provenance.json`` is written first and ``COMPLETE`` last.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_ds.constants import COMPLETE_MARKER, IMAGE_PLACEHOLDER
from llava_ds.datagen.reply import Pair
from llava_ds.durable import replace_file, replacing
from llava_ds.errors import ConfigError

CACHE_FOLDER = "cache"
DATA_FILE, REJECTS_FILE, PROVENANCE_LINES = "data.json", "rejects.jsonl", "provenance.jsonl"
_PROVENANCE, REPORT_FILE = "provenance.json", "report.json"
_MAY_GROW = ("num_samples", "max_attempts")


class OutputFolder:
    """``inputs`` is all that the samples are a function of; a second run must agree with the first."""

    def __init__(self, path: Path, inputs: Mapping[str, Any], endpoint: str | None, packages: Iterable[str]) -> None:
        self.path = path
        self.inputs = json.loads(json.dumps(inputs))
        self._endpoint = endpoint
        self._versions = {"python": platform.python_version()} | {
            name: metadata.version(name) for name in ("llava_ds", *packages)
        }

    def begin(self) -> None:
        """Makes the folder, or takes it up again. Raises ConfigError when it holds something else."""
        before = self._read_before()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / COMPLETE_MARKER).unlink(missing_ok=True)
        endpoints = sorted({*before.get("endpoints", []), *([self._endpoint] if self._endpoint else [])})
        self._write_json(_PROVENANCE, {"inputs": self.inputs, "endpoints": endpoints, "versions": self._versions})

    def write_records(self, records: Iterable[Mapping[str, Any]]) -> int:
        """LLaVA JSON, one record a line of one list. Returns their number."""
        return self._replace(DATA_FILE, records, "[\n", ",\n", "\n]\n")

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> int:
        """JSONL. Returns the number of lines."""
        return self._replace(name, records, "", "\n", "\n")

    def finish(self, report: Mapping[str, Any]) -> None:
        """Writes the report, and ``COMPLETE`` if it says that all is done."""
        self._write_json(REPORT_FILE, report)
        if report["is_complete"]:
            replace_file(self.path / COMPLETE_MARKER, "")

    def _read_before(self) -> dict[str, Any]:
        file = self.path / _PROVENANCE
        check_ours(self.path)
        if not file.is_file():
            return {}
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            differing = _differing(before["inputs"], self.inputs)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} cannot be read ({error!r}); give a new folder") from error
        if differing:
            raise ConfigError(
                f"{self.path} was begun with other settings:\n  " + "\n  ".join(differing)
                + "\n  Give a new folder, or the same settings; only more samples and attempts may be asked for."
            )
        return before

    def _write_json(self, name: str, value: Any) -> None:
        replace_file(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def _replace(self, name: str, records: Iterable[Mapping[str, Any]], start: str, between: str, end: str) -> int:
        count = 0
        with replacing(self.path / name) as file:
            file.write(start)
            for record in records:
                file.write((between if count else "") + json.dumps(record, ensure_ascii=False))
                count += 1
            file.write(end if count or start else "")
        return count


def check_ours(path: Path) -> None:
    """Raises ConfigError when a folder holds something that no run began; writes nothing."""
    if path.is_dir() and not (path / _PROVENANCE).is_file():
        # What a kill leaves of a first run: replies, and files that were being written.
        found = sorted(p.name for p in path.iterdir() if p.name != CACHE_FOLDER and not p.name.startswith("."))
        if found:
            raise ConfigError(f"{path} holds something else ({', '.join(found[:5])}); give a new folder")
    elif path.is_file():
        raise ConfigError(f"{path} is a file; give a new folder")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {before.get(name)!r:.200} then, {now.get(name)!r:.200} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and not _has_grown(name, before.get(name), now.get(name))
    ]


def _has_grown(name: str, before: Any, now: Any) -> bool:
    return name in _MAY_GROW and isinstance(before, int) and isinstance(now, int) and now > before


def llava_record(sample_id: str, image: str, pairs: Iterable[Pair]) -> dict[str, Any]:
    """A sample as LLaVA JSON, its image in front of the first question; training places it anew."""
    turns = [text for pair in pairs for text in (pair.question, pair.answer)]
    turns[0] = f"{IMAGE_PLACEHOLDER}\n{turns[0]}"
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(turns)]
    return {"id": sample_id, "image": image, "conversations": conversations}
