"""Leaving in good order: a signal is noted at once; at the start of a step all ranks agree on it, save, and end.

Slurm warns of a time limit with the signal that the batch script forwards (SIGUSR1), and preempts with SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
import time

EXIT_STOPPED = 85
"""The exit code of a rank that a signal stopped, after a checkpoint."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequested(Exception):
    """All ranks end because one was asked to; ``step`` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}, which is saved; --resume goes on")
        self.step = step

    def __reduce__(self) -> tuple[type[StopRequested], tuple[int]]:
        return StopRequested, (self.step,)


class StopNotice:
    """Whether this process was asked to end, and when.

    A thread reads the signals' numbers from a pipe that the interpreter's own handler writes to. So a signal is noted
    while the main thread waits in a collective, where no handler of Python runs.
    """

    def __init__(self) -> None:
        self.terminated_at: float | None = None
        """When SIGTERM came, by ``time.monotonic``; SIGUSR1 does not set it."""
        self._asked = threading.Event()

    def install(self) -> None:
        """Starts to note signals. Call it once, from the main thread."""
        receiving, sending = os.pipe()
        os.set_blocking(sending, False)
        signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _noted)
        threading.Thread(target=self._listen, args=(receiving,), daemon=True).start()

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked.is_set()

    def _listen(self, receiving: int) -> None:
        while numbers := os.read(receiving, 64):
            if not STOP_NUMBERS.intersection(numbers):
                continue  # another signal that Python handles
            if signal.SIGTERM in numbers and self.terminated_at is None:
                self.terminated_at = time.monotonic()
            self._asked.set()


STOP_NUMBERS = frozenset(map(int, STOP_SIGNALS))


def _noted(number: int, frame: object) -> None:
    """Without a handler of Python the interpreter would not write to the pipe; the thread there does the rest."""
