"""JSONL files whose rows are found by question id, and what is wrong with them, by file and line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.data.sources.jsonl import parse_line
from llava_ds.data.sources.llava_json import check_unicode
from llava_ds.errors import DataError

_MAX_LISTED = 20


@dataclass(frozen=True)
class Row:
    """A record and its place, ``answers.jsonl:17``."""

    where: str
    record: dict[str, Any]


def read_rows(path: Path, is_sent: bool = True) -> list[Row]:
    """The objects of a JSONL file. Raises DataError for a missing or empty file, or a bad line.

    What ``is_sent`` to a model must be Unicode text: half a surrogate pair is a bad line.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give a JSONL file")
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = parse_line(line, where)
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, got {type(record).__name__}")
        if is_sent:
            check_unicode(where, json.dumps(record, ensure_ascii=False))
        rows.append(Row(where, record))
    if not rows:
        raise DataError(f"{path}: no records; give a JSONL file with one a line")
    return rows


def read_id(record: Mapping[str, Any], where: str, key: str = "question_id") -> str:
    """A question's id as text, so 7 and "7" are one question. Raises DataError for what is no id."""
    id = record.get(key)
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise DataError(f"{where}: {key!r} must be a whole number or text, got {id!r:.80}")
    return str(id)


def rows_by_id(rows: Sequence[Row], problems: list[str]) -> dict[str, Row]:
    """Rows by id; what is no id or stands twice goes to ``problems``."""
    found: dict[str, Row] = {}
    for row in rows:
        try:
            id = read_id(row.record, row.where)
        except DataError as error:
            problems.append(str(error))
            continue
        if id in found:
            problems.append(f"{row.where}: question_id {id} stands also in {found[id].where}")
        else:
            found[id] = row
    return found


def id_order(id: str) -> tuple[bool, int, str]:
    """Sorts ids: numbers by value, then texts."""
    return (True, 0, id) if not (id.isascii() and id.isdigit()) else (False, int(id), id)


def listed(items: Collection[str]) -> str:
    """Items for a message, of many the first."""
    more = len(items) - _MAX_LISTED
    return ", ".join(list(items)[:_MAX_LISTED]) + (f", and {more} more" if more > 0 else "")


def compare_ids(asked: Collection[str], found: Collection[str], questions: Path, path: Path) -> Iterator[str]:
    """What is wrong with the ids that were ``found`` in a file, as messages."""
    missing = sorted(set(asked) - set(found), key=id_order)
    unknown = sorted(set(found) - set(asked), key=id_order)
    if missing:
        yield f"{path} lacks {len(missing)} of the {len(asked)} question ids of {questions}: {listed(missing)}"
    if unknown:
        yield f"{path} has {len(unknown)} question id(s) that {questions} lacks: {listed(unknown)}"
