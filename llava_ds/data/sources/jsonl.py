"""A JSONL file of any size by line: scanned once, indexed beside itself, never loaded.

``train.jsonl.index`` holds a header of ``_HEADER_BYTES`` (one line of JSON), the bounds of all lines (uint64,
``num_lines + 1``; line ``k`` is the bytes from bound ``k`` to bound ``k + 1``), and for each blank line the number of
records before it (uint64). The header names size, time and hash of the data; an index that does not fit is built again.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import shutil
import stat
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llava_ds.cache import cache_folder
from llava_ds.errors import DataError

Log = Callable[[str], None]

_VERSION = b'{"llava_ds_jsonl_index": 1, '
_HEADER_BYTES = 512
_BOM = b"\xef\xbb\xbf"
_NEWLINE = ord("\n")
_SPACE = b" \t\r\n"  # the white space of JSON


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class _Header:
    size_bytes: int
    mtime_ns: int
    sha256: str
    num_lines: int
    num_blank: int
    ends_with_newline: bool

    @property
    def index_bytes(self) -> int:
        return _HEADER_BYTES + 8 * (self.num_lines + 1 + self.num_blank)


class JsonlFile:
    """Lines of a JSONL file by number, never loaded as a whole; blank lines are no records.

    Safe under threads and ``fork``. It pickles as its paths and header, and opens both files where it is used.
    """

    def __init__(self, path: Path, index: Path, header: _Header) -> None:
        self.path = path
        self.fingerprint = header.sha256
        self._index = index
        self._header = header
        self._mapped: tuple[np.ndarray, np.ndarray] | None = None
        self._opened: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self._header.num_lines - self._header.num_blank

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a record without the end of its line; a negative ``index`` counts from the end.

        Raises IndexError out of range, and DataError when the file is no longer the one that was indexed.
        """
        line = self._line(index)
        bounds, _ = self._tables()
        start, end = int(bounds[line]), int(bounds[line + 1])
        if not 0 <= start < end <= self._header.size_bytes:
            raise self._changed(line, f"its index says bytes {start} to {end} of {self._header.size_bytes}")
        lead = int(line > 0)  # a line stands between two newlines, so the one before it is read too
        found = self._read(start - lead, end, line)
        body = found[lead:].removesuffix(b"\n")
        if len(found) != end - start + lead:
            raise self._changed(line, f"expected {end - start} bytes at {start}, got {max(len(found) - lead, 0)}")
        is_closed = end < self._header.size_bytes or self._header.ends_with_newline
        if b"\n" in body or (len(body) < end - start) != is_closed or (lead and found[:1] != b"\n"):
            raise self._changed(line, f"bytes {start} to {end} are no longer one line")
        return body.removesuffix(b"\r")

    def line_number(self, index: int) -> int:
        """The line of a record in the file, from 1; blank lines count."""
        return self._line(index) + 1

    def where(self, index: int) -> str:
        """The place of a record in an error message: ``train.jsonl:17``."""
        return f"{self.path.name}:{self.line_number(index)}"

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_mapped": None, "_opened": None}

    def _line(self, index: int) -> int:
        number = operator.index(index)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path.name} has {len(self)} records, got index {index}")
        if not self._header.num_blank:
            return number
        return number + int(np.searchsorted(self._tables()[1], np.uint64(number), side="right"))

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        if self._mapped is None:
            with _open_index(self._index) as file:
                if _read_header(file) != self._header:
                    raise DataError(f"{self._index}: the index of {self.path} has changed since; start again")
                mapped = np.asarray(np.memmap(file, "<u8", "r", _HEADER_BYTES))
            split = self._header.num_lines + 1
            self._mapped = mapped[:split], mapped[split:]
        return self._mapped

    def _read(self, start: int, end: int, line: int) -> bytes:
        try:
            return os.pread(self._descriptor(line), end - start, start)
        except OSError as error:
            raise DataError(
                f"{self.path}:{line + 1}: cannot be read ({error.strerror}); look at its disk and permissions",
                reason="a JSONL file cannot be read",
            ) from error

    def _descriptor(self, line: int) -> int:
        if self._opened is None or self._opened[0] != os.getpid():
            descriptor = os.open(self.path, os.O_RDONLY)
            found, expected = _state(os.fstat(descriptor)), (self._header.size_bytes, self._header.mtime_ns)
            if found != expected:
                os.close(descriptor)
                raise self._changed(line, f"size in bytes and time in ns were {expected}, now {found}")
            weakref.finalize(self, os.close, descriptor)
            self._opened = os.getpid(), descriptor
        return self._opened[1]

    def _changed(self, line: int, how: str) -> DataError:
        return DataError(
            f"{self.path}:{line + 1}: the file has changed since it was indexed: {how}.\n"
            f"  Start again to index it anew; if that does not help, delete {self._index}.",
            reason="a JSONL file has changed since it was indexed",
        )


def open_jsonl(path: Path, log: Log = _to_stderr, chunk_bytes: int = 1 << 20) -> JsonlFile:
    """The file with its index, which is built first where it is missing or does not fit the file.

    The index stands beside the file, or in the cache folder where that cannot be written. Processes may open a file at
    once: each builds an index of its own, the last one stays, and all are alike.
    Raises DataError for a missing, unreadable or empty file, and for one that changes while it is indexed.
    """
    state = _check_file(path)
    places = [path.with_name(path.name + ".index"), _cached_index(path)]
    for place in places:
        header = _fitting_header(place, state)
        if header is not None:
            return JsonlFile(path, place, header)
    refused = []
    for place in places:
        log(f"indexing {path} ({state[0] / 1e6:.1f} MB) into {place}")
        begin = time.perf_counter()
        try:
            header = _build_index(path, place, state, chunk_bytes)
        except OSError as error:
            refused.append(f"{place}: {error.strerror}")
            log(f"no index there: {error.strerror}")
            continue
        file = JsonlFile(path, place, header)
        log(f"indexed {len(file)} records in {time.perf_counter() - begin:.1f} s; blank lines: {header.num_blank}")
        return file
    raise DataError(f"{path}: its index cannot be written ({'; '.join(refused)}); set LLAVA_DS_CACHE to a folder")


def parse_line(line: bytes, origin: str) -> Any:
    """The JSON value of a line; ``origin`` (``train.jsonl:17``) stands in the DataError of a line that has none."""
    advice = "every line must be one JSON value"
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin}:{error.start + 1}: not UTF-8 text: {error.reason} (column in bytes); {advice}",
            reason="not UTF-8 text",
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}:{error.colno}: not valid JSON: {error.msg}, near {_near(error)!r}; {advice}",
            reason="not valid JSON",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{origin}: not valid JSON: {error}; {advice}", reason="not valid JSON") from error


def _near(error: json.JSONDecodeError) -> str:
    return error.doc[max(error.pos - 30, 0) : error.pos + 30]


class _LineTable:
    """Writes the bounds of lines and finds the blank ones while chunks of a file go by."""

    def __init__(self, start: int, bounds: BinaryIO, blanks: BinaryIO) -> None:
        self.position = start
        self.num_lines = 0
        self.num_blank = 0
        self._bounds = bounds
        self._blanks = blanks
        self._line_start = start
        self._is_blank_so_far = True
        bounds.write(np.uint64(start).tobytes())

    def add(self, chunk: bytes) -> None:
        codes = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(codes == _NEWLINE) + 1
        tail = 0
        if len(ends):
            self._close_lines(chunk, codes, ends)
            tail = int(ends[-1])
            self._line_start = self.position + tail
            self._is_blank_so_far = True
        self._is_blank_so_far = self._is_blank_so_far and not chunk[tail:].strip(_SPACE)
        self.position += len(chunk)

    def finish(self) -> bool:
        """Closes a last line without a newline; returns whether there was none to close."""
        is_closed = self._line_start == self.position
        if not is_closed:
            self._write(np.array([self.position]), [0] if self._is_blank_so_far else [])
        return is_closed

    def _close_lines(self, chunk: bytes, codes: np.ndarray, ends: np.ndarray) -> None:
        starts = np.concatenate(([0], ends[:-1]))
        first = codes[starts]
        blank = [
            number
            for number in np.flatnonzero(first <= ord(" ")).tolist()  # few lines, as a rule none
            if (number or self._is_blank_so_far)  # the first line began in an earlier chunk
            and (first[number] == _NEWLINE or not chunk[starts[number] : ends[number]].strip(_SPACE))
        ]
        self._write(ends + self.position, blank)

    def _write(self, ends: np.ndarray, blank: list[int]) -> None:
        self._bounds.write(ends.astype("<u8").tobytes())
        records_before = self.num_lines - self.num_blank + np.array(blank, np.int64) - np.arange(len(blank))
        self._blanks.write(records_before.astype("<u8").tobytes())
        self.num_lines += len(ends)
        self.num_blank += len(blank)


def _build_index(path: Path, place: Path, state: tuple[int, int], chunk_bytes: int) -> _Header:
    """Raises DataError where the data is at fault, and OSError where the index cannot be written."""
    if place.is_dir():
        raise IsADirectoryError(0, "a folder has its name")
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as index, tempfile.TemporaryFile(dir=place.parent) as blanks:
            index.seek(_HEADER_BYTES)
            header = _scan(path, state, index, blanks, chunk_bytes)
            blanks.seek(0)
            shutil.copyfileobj(blanks, index)
            index.seek(0)
            index.write(_VERSION + json.dumps(asdict(header)).encode()[1:] + b"\n")
            index.flush()
            os.fsync(index.fileno())
        unfinished.replace(place)
    finally:
        unfinished.unlink(missing_ok=True)
    return header


def _scan(path: Path, state: tuple[int, int], bounds: BinaryIO, blanks: BinaryIO, chunk_bytes: int) -> _Header:
    with path.open("rb", buffering=0) as data, ThreadPoolExecutor(1) as hasher:
        start = len(_BOM) if _read_chunk(data, 0, len(_BOM)) == _BOM else 0
        digest = hashlib.sha256(_BOM[:start])
        table = _LineTable(start, bounds, blanks)
        hashed: Future[None] | None = None
        while chunk := _read_chunk(data, table.position, chunk_bytes):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, chunk)  # on the other core, while newlines are looked for here
            table.add(chunk)
        ends_with_newline = table.finish()
        hasher.shutdown()
        found = {(table.position, state[1]), _state(os.fstat(data.fileno())), _state(path.stat())}
    if found != {state}:
        raise DataError(
            f"{path}: the file changed while it was indexed: size in bytes and time in ns were {state}, "
            f"now {sorted(found - {state})}; wait until it is written"
        )
    if table.num_lines == table.num_blank:
        raise DataError(f"{path}: no record ({state[0]} bytes, {table.num_lines} lines, all blank); give a JSONL file")
    return _Header(*state, digest.hexdigest(), table.num_lines, table.num_blank, ends_with_newline)


def _read_chunk(data: BinaryIO, position: int, chunk_bytes: int) -> bytes:
    try:
        return os.pread(data.fileno(), chunk_bytes, position)
    except OSError as error:
        where = f"{data.name}: byte {position}"
        raise DataError(f"{where} cannot be read ({error.strerror}); look at its disk") from error


def _check_file(path: Path) -> tuple[int, int]:
    advice = "give a JSONL file (one JSON value a line)"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}; {advice}")
        path.open("rb").close()  # an index must not hide that the file itself cannot be read
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    if found.st_size == 0:
        raise DataError(f"{path}: the file is empty; {advice}")
    return _state(found)


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _cached_index(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return cache_folder() / "jsonl" / f"{path.name}.{key}.index"


def _fitting_header(place: Path, state: tuple[int, int]) -> _Header | None:
    try:
        with place.open("rb") as file:
            header = _read_header(file)
    except OSError:  # none there; why none can be written there is said when it is built
        return None
    return header if header is not None and (header.size_bytes, header.mtime_ns) == state else None


def _open_index(place: Path) -> BinaryIO:
    try:
        return place.open("rb")
    except OSError as error:
        raise DataError(f"{place}: the index cannot be read ({error.strerror}); start again to build it") from error


def _read_header(file: BinaryIO) -> _Header | None:
    """None for anything that is not a whole index of this version."""
    record = file.read(_HEADER_BYTES)
    if not record.startswith(_VERSION):
        return None
    try:
        header = _Header(**json.loads(b"{" + record[len(_VERSION) :].rstrip(b"\0")))
        return header if os.fstat(file.fileno()).st_size == header.index_bytes else None
    except (ValueError, TypeError):
        return None
