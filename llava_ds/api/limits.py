"""How fast an endpoint may be asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Calls at one time, and calls and tokens a minute; None is no limit."""

    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class Pace:
    """Gives calls their times, evenly: no minute, wherever it starts, holds more than the limits and one call."""

    def __init__(self, limits: Limits, now: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._now = limits, now
        self._lock = threading.Lock()
        self._next_s = 0.0

    def take(self, num_tokens: int) -> float:
        """Takes the next free time for a call of ``num_tokens``; returns the seconds until then."""
        with self._lock:
            now_s = self._now()
            start_s = max(now_s, self._next_s)
            self._next_s = start_s + max(
                _minute_share(1, self._limits.requests_per_minute),
                _minute_share(num_tokens, self._limits.tokens_per_minute),
            )
            return start_s - now_s


def _minute_share(amount: float, per_minute: float | None) -> float:
    return 60 * amount / per_minute if per_minute else 0.0
