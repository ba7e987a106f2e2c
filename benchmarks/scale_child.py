"""Runs one part of thousand_ranks.py in a process of its own, and watches how much memory it takes."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from merge_sides import memory_bytes

Figures = dict[str, float]
"""By name, with the unit in the name."""
_POLL_S = 0.003


class CheckFailedError(RuntimeError):
    """What must hold at so many ranks does not."""


def check(holds: bool, message: str) -> None:
    """Raises CheckFailedError with the message unless it holds."""
    if not holds:
        raise CheckFailedError(message)


@contextmanager
def timed(figures: Figures, name: str, per: int = 1) -> Iterator[None]:
    """Adds the time of the block as a figure: in the unit that the name ends with, divided by ``per``.

    The time is what the process computes (``..._cpu_ms``), which other work on the machine changes little, or else
    what a clock says.
    """
    clock = time.process_time if "_cpu_" in name else time.perf_counter
    begin = clock()
    yield
    figures[name] = (clock() - begin) * {"us": 1e6, "ms": 1e3, "s": 1.0}[name.rpartition("_")[2]] / per


def measure_in_child(name: str, work: Callable[[], Figures]) -> Figures:
    """The figures of ``work``, which runs in a forked process, and ``<name>_peak_mb``: how far its RssAnon grows.

    Raises CheckFailedError when the work does, or fails in another way.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, work))
    process.start()
    theirs.close()
    first, peak = memory_bytes("RssAnon", process.pid), 0
    while not ours.poll(_POLL_S):
        peak = max(peak, memory_bytes("RssAnon", process.pid))
    try:
        figures, failure = ours.recv()
    except EOFError:
        figures, failure = {}, "the process ended without a word"
    process.join()
    check(not failure, f"{name}: {failure}")
    return {**figures, f"{name}_peak_mb": max(0, peak - first) / 1e6}


def _run(answers: Connection, work: Callable[[], Figures]) -> None:
    try:
        answers.send((work(), ""))
    except CheckFailedError as error:
        answers.send(({}, str(error)))
    except Exception:
        answers.send(({}, traceback.format_exc()))
