"""What the files of a run say, as far as they can be read: a broken file is named, never raised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from llava_ds.checkpoint.layout import list_steps, step_number
from llava_ds.starts import STARTS_FOLDER, End, Failure, Start

T = TypeVar("T", End, Failure)

METRICS_FILE = "metrics.jsonl"
_FIRST_TAIL_BYTES, _MAX_TAIL_BYTES = 1 << 14, 1 << 20


class RunFiles:
    """The files of one run folder, read when asked for."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.broken: list[str] = []
        """Files that are there but do not say what they should, by their paths in the run folder."""
        self._failures: dict[Path, list[Failure]] = {}

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json; empty where there is none."""
        return self._read_object(self.run_dir / "run.json") or {}

    @cached_property
    def starts(self) -> list[Start]:
        """The starts of the run, the first one first."""
        return [
            Start(folder, self._read_object(folder / "start.json") or {}, self._read(End, folder / "end.json"))
            for folder in _numbered_folders(self.run_dir / STARTS_FOLDER)
        ]

    def read_failures(self, start: Start) -> list[Failure]:
        """Why ranks of a start ended, in the order of time."""
        if start.folder not in self._failures:
            found = [self._read(Failure, file) for file in sorted(start.folder.glob("failed-*.json"))]
            known = [failure for failure in found if failure]
            self._failures[start.folder] = sorted(known, key=lambda failure: to_number(failure.time) or 0.0)
        return self._failures[start.folder]

    def read_metrics(self, num: int) -> list[dict[str, Any]]:
        """The last ``num`` lines of metrics.jsonl, but those that are not JSON; the rest of the file is not read."""
        file = self.run_dir / METRICS_FILE
        try:
            lines = read_last_lines(file, num)
        except FileNotFoundError:
            return []
        except OSError:
            lines = [b""]
        records = [record for line in lines if (record := _parse_object(line)) is not None]
        if lines and not records:
            self._note(file)
        return records

    def last_saved_step(self) -> int | None:
        """The step of the last complete checkpoint."""
        try:
            steps = list_steps(self.run_dir)
        except OSError:
            return None
        return step_number(steps[-1]) if steps else None

    def _read(self, kind: Callable[..., T], file: Path) -> T | None:
        """A record of starts.py; keys that it does not know are left out, as of a later version."""
        raw = self._read_object(file)
        if raw is None:
            return None
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        known = {name: value for name, value in {"host": "?", "time": None, **raw}.items() if name in names}
        try:
            return kind(**known)
        except TypeError:
            self._note(file)
            return None

    def _read_object(self, file: Path) -> dict[str, Any] | None:
        try:
            value = _parse_object(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            value = None
        if value is None:
            self._note(file)
        return value

    def _note(self, file: Path) -> None:
        name = str(file.relative_to(self.run_dir))
        if name not in self.broken:
            self.broken.append(name)


def read_last_lines(file: Path, num: int) -> list[bytes]:
    """At most ``num`` lines from the end of a file, or as many as stand in its last MiB. What follows the last newline
    is being written, and left out. Raises OSError when the file cannot be read."""
    with file.open("rb") as handle:
        size, tail = handle.seek(0, os.SEEK_END), _FIRST_TAIL_BYTES
        while True:
            start = max(0, size - tail)
            handle.seek(start)
            lines = handle.read(size - start).split(b"\n")[:-1]
            if start == 0:
                return lines[-num:]
            if len(lines) > num or tail >= _MAX_TAIL_BYTES:
                return lines[1:][-num:]  # the first may have begun before
            tail *= 4


def to_number(value: object) -> float | None:
    """A finite number; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        return None
    return float(value)


def one_line(text: object) -> str:
    """Text without line breaks, tabs and the control sequences of a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))


def _parse_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _numbered_folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if entry.name.isdecimal() and os.path.isdir(entry.path)]
    except OSError:
        return []
    return [parent / name for name in sorted(names, key=int)]
