"""Rows of a CSV file by number: scanned once for where they begin, then read one at a time."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llava_ds.errors import DataError

_BOM = b"\xef\xbb\xbf"


class CsvRows:
    """Rows as ``{column: text}``, of a file with a header row; lines may break inside quotes, blank lines are no rows.

    Only the bounds of the rows are held: 24 bytes a row.
    """

    def __init__(self, path: Path, columns: list[str], bounds: np.ndarray, state: tuple[int, int]) -> None:
        self.path = path
        self.columns = columns
        self.fingerprint = hashlib.sha256(f"{path.absolute()}|{state}".encode()).hexdigest()
        self._bounds = bounds  # [num_rows, 3]: first byte, end byte, line
        self._state = state

    def __len__(self) -> int:
        return len(self._bounds)

    def where(self, index: int) -> str:
        """The place of a row in an error message: ``pairs.csv:17``."""
        return f"{self.path.name}:{self._bounds[index][2]}"

    def __getitem__(self, index: int) -> dict[str, str]:
        """Raises DataError when the row has not as many fields as the header, or the file has changed."""
        start, end, _ = (int(number) for number in self._bounds[index])
        with _open(self.path) as file:
            if _state(file) != self._state:
                raise DataError(f"{self.path}: the file has changed since it was opened; start again")
            text = os.pread(file.fileno(), end - start, start).decode("utf-8")
        fields = next(csv.reader(io.StringIO(text, newline="\n"), strict=True))
        if len(fields) != len(self.columns):
            raise DataError(
                f"{self.where(index)}: {len(fields)} fields, but the header names {len(self.columns)}: "
                f"{', '.join(self.columns)}; quote fields that hold commas",
                reason="a row has not as many fields as the header",
            )
        return dict(zip(self.columns, fields, strict=True))


def open_csv(path: Path) -> CsvRows:
    """Scans a CSV file. Raises DataError with the line when it is missing, empty, not UTF-8 or not valid CSV."""
    with _open(path) as file:
        state = _state(file)
        rows = _scan(path, file)
        _, _, _, columns = next(rows, (0, 0, 0, []))
        if len(set(columns)) != len(columns) or not columns:
            raise DataError(f"{path}: the header row must name every column once, got {columns!r:.200}")
        bounds = [(start, end, line) for start, end, line, fields in rows if fields]
    if not bounds:
        raise DataError(f"{path}: no row after the header; give a CSV file with a header and rows")
    return CsvRows(path, columns, np.array(bounds, np.int64), state)


def _scan(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, int, list[str]]]:
    position = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(position)
    line = 0

    def lines() -> Iterator[str]:
        nonlocal position, line
        for raw in file:
            position += len(raw)
            line += 1
            yield raw.decode("utf-8")

    start, first_line = position, 1
    try:
        for fields in csv.reader(lines(), strict=True):
            yield start, position, first_line, fields
            start, first_line = position, line + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line}: not UTF-8 text ({error}); write the file as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}:{first_line}: not valid CSV: {error}; look for an unclosed quote") from error


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a CSV file") from error


def _state(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
