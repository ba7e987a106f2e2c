"""The merged log as people read it: what many ranks print alike stands once; the end of it; what is still written."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from llava_ds.cluster.rank_logs import LogLine, RankLog, find_logs, format_ranks, merge
from llava_ds.errors import ConfigError

_WINDOW = timedelta(seconds=2)
"""Ranks print a line alike when this much lies between the first and the last of them."""
_MAX_WAITING = 50_000
_FIRST_TAIL_BYTES = 1 << 14
_POLL_S = 2.0


class ShownLine(NamedTuple):
    """A line, with the ranks that printed it."""

    time_text: str
    """Of the first of them."""
    ranks: tuple[int, ...]
    text: str


def read_log(
    start_folder: Path, ranks: Collection[int] | None = None, last: int | None = None, together: bool = True
) -> Iterator[ShownLine]:
    """The log of a start; only its ``last`` lines on request. ``together``: see ``join_alike``.

    Raises ConfigError when there is no log, or a rank has none.
    """
    if not find_logs(start_folder, ranks):
        raise ConfigError(f"{start_folder}: no rank-*.log there.\n  Give another start, or look into the job's output.")
    if last is not None:
        return iter(_read_end(start_folder, ranks, last, together, whole=True)[0])
    return _show(merge(_open_logs(start_folder, ranks).values()), together)


def follow_log(
    start_folder: Path,
    ranks: Collection[int] | None = None,
    last: int | None = None,
    together: bool = True,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[ShownLine]:
    """As ``read_log``, and then what the ranks go on to write, until the start has ended. Logs may come later.

    Ranks are brought together among the lines that are found at one look.
    """
    logs: dict[int, RankLog] = {}
    if last is not None:
        shown, logs = _read_end(start_folder, ranks, last, together, whole=False)
        yield from shown
    while True:
        ended = (start_folder / "end.json").exists()
        logs = _open_logs(start_folder, ranks) | logs
        yield from _show(merge(logs.values(), whole=ended), together)
        if ended:
            return
        sleep(_POLL_S)


def join_alike(lines: Iterable[LogLine]) -> Iterator[ShownLine]:
    """Lines of the same text that several ranks print within two seconds, as one, where the first of them stands.

    What one rank prints keeps its order, and stands there as often as it was printed.
    """
    groups = _Groups()
    for line in lines:
        while groups.waiting and (groups.waiting[0].until < line.time_text or len(groups.waiting) > _MAX_WAITING):
            yield groups.release()
        groups.add(line)
    while groups.waiting:
        yield groups.release()


def format_line(line: ShownLine) -> str:
    """Like ``2026-11-25 13:02:01.123 [0-7,9] text``."""
    return f"{line.time_text[:23].replace('T', ' '):23} [{format_ranks(line.ranks)}] {line.text}"


@dataclass
class _Group:
    """Lines that are shown as one. A line after ``until`` is not of them."""

    number: int
    time_text: str
    until: str
    text: str
    ranks: list[int] = field(default_factory=list)


class _Groups:
    """The groups that lines may still join, the oldest first."""

    def __init__(self) -> None:
        self.waiting: deque[_Group] = deque()
        self._by_text: dict[str, list[_Group]] = {}
        self._last: dict[int, int] = {}
        """The group of each rank's last line: its next one stands in a later group."""
        self._num = 0

    def add(self, line: LogLine) -> None:
        """Puts a line into the first group that it fits, or a new one."""
        groups = self._by_text.setdefault(line.text, [])
        place = bisect_right(groups, self._last.get(line.rank, -1), key=lambda group: group.number)
        if place == len(groups):
            group = _Group(self._num, line.time_text, _later(line.time_text), line.text)
            self._num += 1
            groups.append(group)
            self.waiting.append(group)
        groups[place].ranks.append(line.rank)
        self._last[line.rank] = groups[place].number

    def release(self) -> ShownLine:
        """Takes the oldest group out."""
        group = self.waiting.popleft()
        same = self._by_text[group.text]
        same.pop(0)
        if not same:
            del self._by_text[group.text]
        return ShownLine(group.time_text, tuple(sorted(group.ranks)), group.text)


def _show(lines: Iterable[LogLine], together: bool) -> Iterator[ShownLine]:
    return join_alike(lines) if together else (ShownLine(line.time_text, (line.rank,), line.text) for line in lines)


def _read_end(
    start_folder: Path, ranks: Collection[int] | None, num: int, together: bool, whole: bool
) -> tuple[list[ShownLine], dict[int, RankLog]]:
    """The last lines, and the logs, which then stand at their ends.

    Only the ends of files are read, longer ones until what stands before them cannot matter. A clock that was ahead
    before them is not seen.
    """
    tail_bytes = _FIRST_TAIL_BYTES
    while True:
        logs = _open_logs(start_folder, ranks, tail_bytes)
        cut = max((log.time_text for log in logs.values() if log.offset), default=None)
        shown = deque(_show(merge(logs.values(), whole), together), maxlen=num)
        if cut is None or (len(shown) == num and shown[0].time_text > _later(cut)):
            return list(shown), logs
        tail_bytes *= 4


def _open_logs(
    start_folder: Path, ranks: Collection[int] | None, tail_bytes: int | None = None
) -> dict[int, RankLog]:
    """The logs that are there, of all ranks or of ``ranks``."""
    return {
        rank: RankLog(file, rank) if tail_bytes is None else RankLog.at_tail(file, rank, tail_bytes)
        for rank, file in find_logs(start_folder).items() if ranks is None or rank in ranks
    }


def _later(time_text: str) -> str:
    try:
        return (datetime.fromisoformat(time_text) + _WINDOW).isoformat(timespec="microseconds")
    except (ValueError, OverflowError):  # before the first stamp, or not a date
        return time_text
