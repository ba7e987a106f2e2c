"""LLaVA JSON: a list of ``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llava_ds.errors import DataError
from llava_ds.schema import Role, Sample, Turn

_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_llava_json(path: Path, on_bad_sample: str = "error") -> tuple[list[Sample], Counter[str]]:
    """The samples of a file, and how many records were skipped by reason (``on_bad_sample="skip"``).

    Raises DataError for a missing or broken file, and for the first bad record when ``on_bad_sample="error"``.
    """
    records = read_json_list(path, "a LLaVA JSON file as data.path")
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    for number, record in enumerate(records):
        try:
            samples.append(_parse_record(record, f"{path.name}[{number}]"))
        except DataError as error:
            if on_bad_sample != "skip":
                raise
            skipped[error.reason] += 1
    return samples, skipped


def read_json_list(path: Path, wanted: str) -> list[Any]:
    """The records of a JSON file. Raises DataError that names the file, the place and what is ``wanted``."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give {wanted}")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); give {wanted}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}; give {wanted}") from error
    if not isinstance(records, list) or not records:
        got = "an empty list" if records == [] else type(records).__name__
        raise DataError(f"{path}: expected a list of records, got {got}; give {wanted}")
    return records


def _parse_record(record: Any, origin: str) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, got {type(record).__name__}", reason="not an object")
    if "id" not in record:
        raise DataError(
            f"{origin}: no 'id'; every record needs one, because placement is a function of it", reason="no 'id'"
        )
    where = f"{origin} id={str(record['id'])!r}"
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(
            f"{where}: 'image' must be a path or a list of paths, got {images!r}", reason="'image' is no path or list"
        )
    conversations = record.get("conversations")
    if not isinstance(conversations, list):
        raise DataError(
            f"{where}: 'conversations' must be a list of turns, got {type(conversations).__name__}",
            reason="'conversations' is no list",
        )
    if not conversations:
        raise DataError(
            f"{where}: 'conversations' is empty; drop the record, or set data.on_bad_sample=skip",
            reason="'conversations' is empty",
        )
    turns = tuple(_parse_turn(turn, f"{where} turn {number}") for number, turn in enumerate(conversations))
    return Sample(str(record["id"]), tuple(images), turns, origin)


def _parse_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise DataError(
            f"{where}: expected {{'from': ..., 'value': text}}, got {turn!r:.80}", reason="a turn without from or value"
        )
    if turn["from"] not in _ROLES:
        raise DataError(
            f"{where}: unknown role {turn['from']!r}; known roles: {', '.join(_ROLES)}", reason="unknown role"
        )
    return Turn(_ROLES[turn["from"]], turn["value"])
