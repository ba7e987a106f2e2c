"""Threads that work on items as these come."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_concurrently(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_threads: int,
    stop: threading.Event,
    grace_s: float,
    log: Callable[[str], None],
) -> Generator[Result]:
    """Results of ``function`` over ``items`` as they complete; items are taken as threads come free.

    What ``function`` raises is raised here. At the end, whichever it is, ``stop`` is set, and threads that still work
    get ``grace_s`` to finish; ``function`` heeds ``stop``.
    """
    todo: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while (item := todo.get()) is not None:
            try:
                done.put((function(item), None))
            except BaseException as error:  # raised where the results are taken
                done.put((None, error))

    def take() -> Result:
        result, error = done.get()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    num_waiting = 0
    try:
        for item in items:
            todo.put(item)
            num_waiting += 1
            if num_waiting >= 2 * num_threads:  # no thread runs dry, and items are not taken long before
                yield take()
                num_waiting -= 1
        while num_waiting:
            yield take()
            num_waiting -= 1
    finally:
        stop.set()
        for _ in threads:
            todo.put(None)
        if num_waiting:
            log(f"ending early: what is in flight gets up to {grace_s:g} s, so that it is kept; Ctrl-C leaves it")
        deadline = time.monotonic() + grace_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
