"""What is good of a bad record, so that tools/doctor can look at the rest of it too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.data.sources.captions import CaptionSource
from llava_ds.data.sources.jsonl import parse_line
from llava_ds.data.sources.llava_json import LlavaJson, LlavaJsonl, parse_record
from llava_ds.data.sources.source import Source
from llava_ds.errors import DataError
from llava_ds.schema import Sample

_ROLE_ORDER = ("human", "gpt")
_KNOWN_ROLES = (*_ROLE_ORDER, "user", "assistant")
_ANY_TURN = {"from": "human", "value": ""}


@dataclass(frozen=True)
class ReadRecord:
    """A record as far as it can be read; ``sample`` is None where not even its images are known.

    Of a record with an ``error``, roles may be guessed; where ``has_turns`` is False, only id and images are its own.
    """

    origin: str
    sample: Sample | None
    error: DataError | None = None
    has_turns: bool = True


def read_record(source: Source, index: int) -> ReadRecord:
    """The record at ``index``; of a bad one in a LLaVA JSON or JSONL file, what can be had of it."""
    try:
        sample = source[index]
        return ReadRecord(sample.origin, sample)
    except DataError as error:
        origin, image_root = _place(source, index)
        raw = _raw_record(source, index)
        for repaired, has_turns in (_repairs(raw) if isinstance(raw, dict) else ()):
            try:
                return ReadRecord(origin, parse_record(repaired, origin, image_root), error, has_turns)
            except DataError:
                continue
        return ReadRecord(origin, None, error)


def _raw_record(source: Source, index: int) -> Any:
    try:
        if isinstance(source, LlavaJson):
            return source.records[index]
        if isinstance(source, LlavaJsonl):
            return parse_line(source.file[index], "")
    except DataError:
        pass
    return None


def _place(source: Source, index: int) -> tuple[str, Path]:
    if isinstance(source, LlavaJsonl):
        return source.file.where(index), source.image_root
    if isinstance(source, CaptionSource):
        return source.rows.where(index), source.image_root
    return f"{source.name}[{index}]", getattr(source, "image_root", Path())


def _repairs(raw: dict[str, Any]) -> tuple[tuple[dict[str, Any], bool], ...]:
    """With the roles that belong in their places; with no turn of its own. Each says whether it has its turns."""
    turns = raw.get("conversations")
    without = {**raw, "conversations": [_ANY_TURN]}, False
    if not isinstance(turns, list):
        return (without,)
    return ({**raw, "conversations": [_with_known_role(turn, n) for n, turn in enumerate(turns)]}, True), without


def _with_known_role(turn: Any, number: int) -> Any:
    if not isinstance(turn, dict) or turn.get("from") in _KNOWN_ROLES:
        return turn
    return {**turn, "from": _ROLE_ORDER[number % 2]}
