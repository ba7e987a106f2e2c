"""When a call that failed is made again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter, a number of tries and a longest wait, each for one request and attempt."""

    max_tries: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 60.0
    max_total_wait_s: float = 600.0
