"""A file of answers that grows in parts: what was answered before a crash is not asked again.

| file | |
|---|---|
| ``answers.jsonl.settings.json`` | how the answers are made; written first |
| ``answers.jsonl.parts/*.jsonl`` | ``{"id", "text"}`` a line, one file for each rank of each launch, as answers come |
| ``answers.jsonl`` | all answers in the order of the questions; written last, then the parts are removed |
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llava_ds.durable import replace_file
from llava_ds.errors import ConfigError, DataError


class PredictionFile:
    """Answers of one model to one set of questions, all with the same ``settings``."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        self.settings = dict(settings)
        self._settings_file = file.with_name(f"{file.name}.settings.json")
        self._parts = file.with_name(f"{file.name}.parts")

    def begin(self) -> dict[str, str]:
        """The answers that are there already, by id.

        Raises ConfigError when they were made with other settings, or nothing says how; DataError when the file cannot
        be read.
        """
        answers = self._read()
        if answers:
            self._check_settings()
        self._parts.mkdir(exist_ok=True)
        replace_file(self._settings_file, json.dumps(self.settings, indent=1) + "\n")
        return answers

    def _check_settings(self) -> None:
        settings = self._settings_file.name
        advice = f"give another file, or remove {self.file}, {settings} and {self._parts.name}"
        if not self._settings_file.is_file():
            raise ConfigError(f"{self.file}: there are answers already, but no {settings} says of what; {advice}")
        there = json.loads(self._settings_file.read_text())
        differing = [
            f"  {key}: {there.get(key)} there, {self.settings.get(key)} now"
            for key in there | self.settings
            if there.get(key) != self.settings.get(key)
        ]
        if differing:
            raise ConfigError("\n".join([f"{self.file} holds answers of other settings:", *differing, f"  {advice}"]))

    def _read(self) -> dict[str, str]:
        """Answers of the whole file and of all parts."""
        answers: dict[str, str] = {}
        for part in sorted(self._parts.glob("*.jsonl")):
            answers |= _read_part(part)
        if self.file.is_file():
            try:
                records = [json.loads(line) for line in self.file.read_text().splitlines()]
                answers |= {str(record.get("id", record.get("question_id"))): record["text"] for record in records}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{self.file}: not a file of answers: {error!r}; give another file") from error
        return answers

    @contextmanager
    def part(self, rank: int) -> Iterator[Part]:
        """A new part of this rank, empty."""
        name = f"rank-{rank:05d}-{uuid.uuid4().hex}.jsonl"  # one that was cut off is not written to again
        with (self._parts / name).open("w") as handle:
            yield Part(handle)

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes the whole file and removes the parts."""
        replace_file(self.file, "".join(json.dumps(record) + "\n" for record in records))
        shutil.rmtree(self._parts)


def _read_part(file: Path) -> dict[str, str]:
    """The whole lines of a part. Where a process or a machine died in a line, its question is asked again."""
    answers = {}
    for line in file.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
            answers[record["id"]] = record["text"]
        except ValueError:
            continue
    return answers


class Part:
    """Answers as they come."""

    def __init__(self, handle: IO[str] | None) -> None:
        self._handle = handle

    def add(self, answers: Mapping[str, str]) -> None:
        """Adds answers by id; a process that is killed afterwards does not lose them."""
        if self._handle:
            self._handle.writelines(json.dumps({"id": key, "text": text}) + "\n" for key, text in answers.items())
            self._handle.flush()
