"""What the ranks of a start printed, merged by time.

A line of ``rank-00003.log`` begins with the local time of its machine, ``2026-11-25T13:02:01.123456``. Nothing is held
but a block of each file, and one file is open at a time: a thousand ranks are read with any limit on open files.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llava_ds.errors import ConfigError
from llava_ds.starts import rank_log

_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[.,]\d+)?)(?: |$)")
_STAMP_AFTER_NEWLINE = re.compile(rb"\n(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[.,]\d+)?)[ \n]")
_LOG_NAME = re.compile(r"rank-(\d+)\.log")
_ALL_BLOCKS_BYTES, _MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES = 1 << 24, 1 << 12, 1 << 18
_MAX_LINE_BYTES = 1 << 16
"""A longer line is shown in pieces."""


class LogLine(NamedTuple):
    """One line. They compare by time, then by rank."""

    time_text: str
    """As in the file; that of the line before where a line has none, empty before the first."""
    rank: int
    text: str
    """Of a progress bar, which writes over itself by carriage returns, what was left to see."""


class RankLog:
    """One rank's log, from ``offset`` (bytes) on. The file is open only while a block of it is read."""

    def __init__(self, file: Path, rank: int, offset: int = 0, time_text: str = "") -> None:
        self.file, self.rank, self.offset, self.time_text = file, rank, offset, time_text

    @classmethod
    def at_tail(cls, file: Path, rank: int, num_bytes: int) -> RankLog:
        """From the first stamped line of its last ``num_bytes`` on; from the start where that has none.

        Raises OSError when the file cannot be read.
        """
        with file.open("rb") as handle:
            start = handle.seek(0, 2) - num_bytes
            if start <= 0:
                return cls(file, rank)
            handle.seek(start)
            found = _STAMP_AFTER_NEWLINE.search(handle.read(num_bytes))
        return cls(file, rank, start + found.start(1), _normal(found[1].decode())) if found else cls(file, rank)

    def read_lines(self, block_bytes: int = _MAX_BLOCK_BYTES, whole: bool = True) -> Iterator[LogLine]:
        """The lines that are there now. A last line without an end is left for the next call, unless ``whole``.

        Raises OSError when the file cannot be read; a file that is gone has ended.
        """
        rest = b""
        while block := self._read_block(block_bytes):
            *lines, rest = (rest + block).split(b"\n")
            yield from map(self._parse, lines)
            if len(rest) > _MAX_LINE_BYTES:
                cut = _cut_of(rest)
                yield self._parse(rest[:cut])
                rest = rest[cut:]
        if rest and whole:
            yield self._parse(rest)
        elif rest:
            self.offset -= len(rest)

    def _read_block(self, num_bytes: int) -> bytes:
        try:
            with self.file.open("rb", buffering=0) as handle:
                handle.seek(self.offset)
                block = handle.read(num_bytes) or b""
        except FileNotFoundError:
            return b""
        self.offset += len(block)
        return block

    def _parse(self, raw: bytes) -> LogLine:
        text = raw.decode("utf-8", "replace")
        stamp = _STAMP.match(text)
        if stamp:
            self.time_text, text = _normal(stamp[1]), text[stamp.end():]
        return LogLine(self.time_text, self.rank, text.rstrip("\r").rpartition("\r")[2])


def merged_lines(start_folder: Path, ranks: Collection[int] | None = None) -> Iterator[LogLine]:
    """The lines of all ranks (or of ``ranks``) by time, those of one time by rank.

    The lines of one rank keep their order, also when its clock goes back. Raises ConfigError when a rank has no log.
    """
    return merge(RankLog(file, rank) for rank, file in find_logs(start_folder, ranks).items())


def merge(logs: Iterable[RankLog], whole: bool = True) -> Iterator[LogLine]:
    """The lines of logs by time, from where each stands. ``whole`` as of ``RankLog.read_lines``."""
    logs = list(logs)
    block_bytes = min(_MAX_BLOCK_BYTES, max(_MIN_BLOCK_BYTES, _ALL_BLOCKS_BYTES // max(1, len(logs))))
    return heapq.merge(*(log.read_lines(block_bytes, whole) for log in logs))


def find_logs(start_folder: Path, ranks: Collection[int] | None = None) -> dict[int, Path]:
    """The logs of a start by rank, in order. Raises ConfigError when one of ``ranks`` has none."""
    found = {}
    for file in start_folder.glob("rank-*.log"):
        name = _LOG_NAME.fullmatch(file.name)
        if name:
            found[int(name[1])] = file
    missing = sorted(set(ranks or ()) - set(found))
    if missing:
        there = f"there are those of ranks {format_ranks(found)}" if found else "no rank has one"
        wanted = rank_log(start_folder, missing[0])
        raise ConfigError(f"{wanted}: no such log; {there}.\n  Give one of these ranks, or another start.")
    return {rank: found[rank] for rank in sorted(found if ranks is None else set(ranks))}


def format_ranks(ranks: Iterable[int]) -> str:
    """Like ``0-7,9``."""
    spans: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _normal(stamp: str) -> str:
    """Some languages write a comma in a number."""
    return stamp.replace(",", ".")


def _cut_of(data: bytes) -> int:
    """Where a line that is too long is cut: after a carriage return, or else before its last letter."""
    after_return = data.rfind(b"\r") + 1
    letters = (at for at in range(len(data) - 1, len(data) - 5, -1) if data[at] & 0xC0 != 0x80)
    return after_return or next(letters, len(data))
