"""A file of answers that grows in parts: what was answered before a crash is not asked again.

| file | |
|---|---|
| ``answers.jsonl.settings.json`` | how the answers are made; written first |
| ``answers.jsonl.parts/*.jsonl`` | ``{"id", "text"}`` a line, one file for each rank of each launch, as answers come |
| ``answers.jsonl`` | all answers in the order of the questions; written last, then the parts are removed |

The name of a part holds a hash of the settings: launches that begin together all find nothing, and write one file of
settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llava_ds.durable import replace_file
from llava_ds.errors import ConfigError, DataError
from llava_ds.evaluation.question_rows import read_id, read_rows


class PredictionFile:
    """Answers of one model to one set of questions, all with the same ``settings``, which are JSON values."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        self.settings = dict(settings)
        self._settings_file = file.with_name(f"{file.name}.settings.json")
        self._parts = file.with_name(f"{file.name}.parts")
        self._hash = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    def begin(self) -> dict[str, str]:
        """The answers that are there already, by id.

        Raises ConfigError when they were made with other settings, or nothing says how; DataError when a file cannot
        be read.
        """
        whole = self._read_whole()
        self._check_settings(bool(whole))
        answers: dict[str, str] = {}
        for part in self._list_parts(ours=True):
            answers |= _read_part(part)
        self._parts.mkdir(exist_ok=True)
        self._write_settings()
        return answers | whole

    def _check_settings(self, has_whole: bool) -> None:
        foreign = [part for part in self._list_parts(ours=False) if _read_part(part)]
        if not (has_whole or foreign):
            return
        file = self._settings_file
        advice = f"give another file, or remove {self.file}, {file.name} and {self._parts.name}"
        if not file.is_file():
            raise ConfigError(f"{self.file}: there are answers already, but no {file.name} says of what; {advice}")
        try:
            there = json.loads(file.read_bytes())
        except ValueError:
            there = None
        if not isinstance(there, dict):
            raise ConfigError(f"{file}: damaged, so nothing says of what the answers are; {advice}")
        differing = [
            f"  {key}: {there.get(key)} there, {self.settings.get(key)} now"
            for key in there | self.settings
            if there.get(key) != self.settings.get(key)
        ]
        if differing:
            raise ConfigError("\n".join([f"{self.file} holds answers of other settings:", *differing, f"  {advice}"]))
        if foreign:
            raise ConfigError(f"{foreign[0]}: answers of other settings, from a launch at the same time; {advice}")

    def _write_settings(self) -> None:
        replace_file(self._settings_file, json.dumps(self.settings, indent=1) + "\n")

    def _list_parts(self, ours: bool) -> list[Path]:
        return [part for part in sorted(self._parts.glob("*.jsonl")) if (self._hash in part.name) == ours]

    def _read_whole(self) -> dict[str, str]:
        answers: dict[str, str] = {}
        if not self.file.is_file() or not self.file.stat().st_size:
            return answers
        try:
            for row in read_rows(self.file):
                id, text = parse_answer(row.record, row.where)
                if id in answers:
                    raise DataError(f"{row.where}: id {id!r} stands twice")
                answers[id] = text
        except DataError as error:
            raise DataError(f"{self.file}: not a file of answers: {error}; mend it, or give another file") from error
        return answers

    @contextmanager
    def part(self, rank: int) -> Iterator[Part]:
        """A new part of this rank, empty."""
        # One that was cut off is not written to again.
        name = f"rank-{rank:05d}-{self._hash}-{uuid.uuid4().hex}.jsonl"
        self._parts.mkdir(exist_ok=True)  # another launch may have finished
        with (self._parts / name).open("w") as handle:
            yield Part(handle)

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes the whole file and removes the parts.

        Raises ConfigError, and writes nothing, where a launch with other settings has left answers meanwhile.
        """
        self._check_settings(self.file.is_file())
        self._write_settings()
        replace_file(self.file, "".join(json.dumps(record) + "\n" for record in records))
        shutil.rmtree(self._parts, ignore_errors=True)  # another launch of these settings may remove them, too


def parse_answer(record: Any, place: str) -> tuple[str, str]:
    """Id and text of ``{"id" or "question_id", "text"}``. Raises DataError that begins with ``place``."""
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object, got {type(record).__name__}")
    ids = {key: read_id(record, place, key) for key in ("id", "question_id") if key in record}
    if not ids:
        raise DataError(f"{place}: has neither 'id' nor 'question_id'")
    if len(set(ids.values())) > 1:
        raise DataError(f"{place}: 'id' and 'question_id' differ: {ids!r:.80}; keep the one that the problems have")
    if not isinstance(text := record.get("text"), str):
        raise DataError(f"{place}: the answer must be text (it may be empty), got {text!r:.80}")
    return next(iter(ids.values())), text


def _read_part(file: Path) -> dict[str, str]:
    """The whole lines of a part. Where a process or a machine died in a line, its question is asked again.

    Raises DataError for a line that is JSON and no answer.
    """
    answers = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        try:
            id, text = parse_answer(record, f"{file}:{number}")
        except DataError as error:
            raise DataError(f"{error}; remove that line: its question is asked again") from error
        answers[id] = text
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
