"""Work on chunks in forked processes, results in the order of the chunks."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from llava_ds.errors import DataError

T = TypeVar("T")
_AHEAD = 4  # chunks a process that are handed out before the first is needed

# Set before the processes are forked, so that nothing has to be pickled.
_forked_work: list[Callable[[Any], Any]] = []


def map_forked(work: Callable[[Any], T], chunks: Sequence[Any], num_processes: int, unit: str) -> Iterator[T]:
    """``work`` of every chunk, with a progress bar of ``unit``s; few results wait at a time.

    Raises what ``work`` raises, and DataError when a process is killed.
    """
    with tqdm(total=sum(map(len, chunks)), unit=unit, unit_scale=True, disable=None) as progress:
        results = map(work, chunks) if num_processes == 1 else _in_processes(work, chunks, num_processes, unit)
        for chunk, result in zip(chunks, results, strict=True):
            yield result
            progress.update(len(chunk))


def _in_processes(work: Callable[[Any], T], chunks: Sequence[Any], num_processes: int, unit: str) -> Iterator[T]:
    _forked_work.append(work)
    waiting: deque[Future[T]] = deque()
    try:
        with ProcessPoolExecutor(num_processes, multiprocessing.get_context("fork")) as pool:
            for chunk in chunks:
                waiting.append(pool.submit(_forked_call, chunk))
                if len(waiting) > _AHEAD * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that looked at {unit}s was killed, as happens when memory runs out; use fewer processes"
        ) from error
    finally:
        _forked_work.pop()


def _forked_call(chunk: Any) -> Any:
    return _forked_work[-1](chunk)
