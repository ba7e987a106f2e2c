"""Rows of a parquet file by number, read a row group at a time (pyarrow, the extra llava_ds[data])."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_ds.errors import BackendUnavailableError, DataError
from llava_ds.schema import StoredImage


@dataclass(frozen=True)
class ParquetRows:
    """Rows as ``{column: value}``; the image column gives a path, or a StoredImage where it holds bytes.

    A few row groups of texts and one of images are kept. Reading one image reads its whole row group: for training in
    random order from large files with images inside, tools/make_shards is the better format.
    """

    path: Path
    image_column: str
    image_root: Path
    columns: tuple[str, ...]
    image_kind: str
    """``path``, ``bytes``, or ``struct`` (bytes and path, as Hugging Face writes images)."""
    state: tuple[int, int]
    group_ends: np.ndarray = field(repr=False)
    fingerprint: str = ""

    def __len__(self) -> int:
        return int(self.group_ends[-1])

    def where(self, index: int) -> str:
        """The place of a row in an error message: ``pairs.parquet[17]``."""
        return f"{self.path.name}[{range(len(self))[index]}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError when the row group does not decode, or the file has changed."""
        group, row = self._locate(index)
        texts = _text_group(self.path, self.state, group, self._text_columns())
        values = {name: _value(texts, name, row, self.where(index)) for name in texts.column_names}
        if self.image_kind != "path":
            path = (values.get(self.image_column) or {}).get("path")
            name = f"{self.where(index)}:{path}" if path else self.where(index)
            values[self.image_column] = StoredImage(name, partial(self.read_image, index))
        return values

    def read_image(self, index: int) -> bytes:
        """The encoded bytes of a row's image; from the file that it names when only a path is stored."""
        group, row = self._locate(index)
        images = _image_group(self.path, self.state, group, (self.image_column,))
        value = _value(images, self.image_column, row, self.where(index))
        if self.image_kind == "struct" and value is not None:
            content, path = value.get("bytes"), value.get("path")
            if not content and path:
                return _read_file(self.image_root / path, self.where(index))
            value = content
        if not value:
            raise DataError(f"{self.where(index)}: no image; drop the row", reason="no image")
        return value

    def _locate(self, index: int) -> tuple[int, int]:
        number = range(len(self))[index]
        group = int(np.searchsorted(self.group_ends, number, side="right"))
        return group, number - (int(self.group_ends[group - 1]) if group else 0)

    def _text_columns(self) -> tuple[str, ...]:
        others = tuple(name for name in self.columns if name != self.image_column)
        image = {"path": (self.image_column,), "struct": (f"{self.image_column}.path",)}.get(self.image_kind, ())
        return others + image


def open_parquet(path: Path, columns: tuple[str, ...], image_column: str, image_root: Path) -> ParquetRows:
    """Opens a parquet file; those of ``columns`` that it has are read, its ``image_column`` as images.

    Raises BackendUnavailableError without pyarrow, DataError for a file that is missing, broken, or has no row.
    """
    state = _state(path)
    file = _parquet_file(path)
    schema, metadata = file.schema_arrow, file.metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(sizes, default=0) < 0 or not sum(sizes):
        raise DataError(f"{path}: no row; give a parquet file with rows")
    found = tuple(name for name in columns if name in schema.names)
    kind = _image_kind(path, schema.field(image_column).type) if image_column in schema.names else "path"
    fingerprint = hashlib.sha256(f"{path.absolute()}|{state}".encode()).hexdigest()
    return ParquetRows(path, image_column, image_root, found, kind, state, np.cumsum(sizes), fingerprint)


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns. Raises as ``open_parquet``."""
    _state(path)
    return list(_parquet_file(path).schema_arrow.names)


def _image_kind(path: Path, kind: Any) -> str:
    import pyarrow

    types = pyarrow.types
    if types.is_string(kind) or types.is_large_string(kind):
        return "path"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_struct(kind) and {"bytes", "path"} <= {part.name for part in kind}:
        return "struct"
    raise DataError(
        f"{path}: the image column is of type {kind}; it must hold paths, bytes, or structs of bytes and path"
    )


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise BackendUnavailableError(
            f"{path}: parquet files need pyarrow ({error}); run: pip install -e \".[data]\""
        ) from error
    try:
        return parquet.ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a parquet file that can be read: {error}; write it again") from error


def _read_group(path: Path, state: tuple[int, int], group: int, columns: tuple[str, ...]) -> Any:
    import pyarrow

    if _state(path) != state:
        raise DataError(f"{path}: the file has changed since it was opened; start again")
    try:
        with _parquet_file(path) as file:
            # One thread: the pools of a parent process do not survive fork.
            return file.read_row_group(group, columns=list(columns), use_threads=False)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{path}: row group {group} does not decode: {error}; write the file again",
            reason="a row group does not decode",
        ) from error


_text_group = lru_cache(maxsize=8)(_read_group)
_image_group = lru_cache(maxsize=1)(_read_group)


def _value(table: Any, column: str, row: int, where: str) -> Any:
    try:
        return table[column][row].as_py()
    except (ValueError, IndexError) as error:  # bytes that are no UTF-8, or fewer rows than the footer says
        raise DataError(
            f"{where}: column {column!r} does not decode: {error}; write the file again",
            reason="a value does not decode",
        ) from error


def _read_file(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise DataError(
            f"{where}: image {path} cannot be read ({error}); fix the path, or the image root before it",
            reason="image file is missing",
        ) from error


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a parquet file") from error
    return found.st_size, found.st_mtime_ns
