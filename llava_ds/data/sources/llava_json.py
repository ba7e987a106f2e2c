"""LLaVA JSON: ``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}`` in a list, or one a line.

``image`` is a path or a list of paths.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.data.sources.jsonl import JsonlFile, open_jsonl, parse_line
from llava_ds.errors import DataError
from llava_ds.schema import Role, Sample, Turn

_WANTED = "a LLaVA JSON file as data.path"
_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class LlavaJson:
    """A JSON list, held in memory. A ``Source``."""

    name: str
    fingerprint: str
    records: list[Any]
    image_root: Path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return parse_record(self.records[index], f"{self.name}[{index}]", self.image_root)


@dataclass(frozen=True)
class LlavaJsonl:
    """A JSONL file of any size, read line by line when asked. A ``Source``."""

    file: JsonlFile
    image_root: Path

    @property
    def name(self) -> str:
        return self.file.path.name

    @property
    def fingerprint(self) -> str:
        return _with_root(self.file.fingerprint, self.image_root)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Sample:
        origin = f"{self.name}:{self.file.line_number(index)}"
        return parse_record(parse_line(self.file[index], origin), origin, self.image_root)


def open_llava_json(path: Path, image_root: Path) -> LlavaJson:
    """A LLaVA JSON file as a source. Raises DataError for a missing or broken file."""
    content = _read_file(path, _WANTED)
    fingerprint = _with_root(hashlib.sha256(content).hexdigest(), image_root)
    return LlavaJson(path.name, fingerprint, _parse_list(content, path, _WANTED), image_root)


def open_llava_jsonl(path: Path, image_root: Path) -> LlavaJsonl:
    """A JSONL file as a source; the first open writes its index. Raises DataError for a missing or broken file."""
    return LlavaJsonl(open_jsonl(path), image_root)


def _with_root(sha256: str, image_root: Path) -> str:
    """The images of a record are full paths: another root makes other records."""
    return hashlib.sha256(f"{sha256}|{image_root}".encode()).hexdigest()


def read_json_list(path: Path, wanted: str) -> list[Any]:
    """The records of a JSON file. Raises DataError that names the file, the place and what is ``wanted``."""
    return _parse_list(_read_file(path, wanted), path, wanted)


def _read_file(path: Path, wanted: str) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give {wanted}")
    return path.read_bytes()


def _parse_list(content: bytes, path: Path, wanted: str) -> list[Any]:
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); give {wanted}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}; give {wanted}") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply to be {wanted}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}: not JSON that can be read: {error}; give {wanted}") from error
    if not isinstance(records, list) or not records:
        got = "an empty list" if records == [] else type(records).__name__
        raise DataError(f"{path}: expected a list of records, got {got}; give {wanted}")
    return records


def parse_record(record: Any, origin: str, image_root: Path) -> Sample:
    """One record, its relative image paths taken from ``image_root``. Raises DataError that names it by ``origin``."""
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, got {type(record).__name__}", reason="not an object")
    if "id" not in record:
        raise DataError(
            f"{origin}: no 'id'; every record needs one, because placement is a function of it", reason="no 'id'"
        )
    if not isinstance(record["id"], str | int) or isinstance(record["id"], bool):
        raise DataError(f"{origin}: 'id' must be text or a number, got {record['id']!r:.80}", reason="'id' is no text")
    try:
        return _parse_known(record, str(record["id"]), origin, image_root)
    except DataError as error:
        raise DataError(str(error), error.reason, str(record["id"])) from error


def _parse_known(record: dict[str, Any], sample_id: str, origin: str, image_root: Path) -> Sample:
    where = f"{origin} id={sample_id!r}"
    images = record.get("image")
    images = [] if images in (None, "") else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
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
    check_unicode(where, sample_id, *images, *(turn.text for turn in turns))
    return Sample(sample_id, tuple(str(image_root / image) for image in images), turns, origin)


def check_unicode(where: str, *texts: str) -> None:
    """Raises DataError for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: not Unicode text: {error}; repair the \\u escapes of the record", reason="not Unicode text"
        ) from error


def is_number(value: Any) -> bool:
    """An int or float that is finite as a float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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
