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

    def wait_s(self, num_failed: int, retry_after_s: float | None, jitter: float) -> float:
        """Seconds from failure ``num_failed`` (1, 2, ...) to the next try.

        ``jitter`` in [0, 1) spreads calls that failed together: the wait is half to all of the back-off. A server that
        names a time is taken at its word, and the calls spread behind it.
        """
        if retry_after_s is not None:
            return retry_after_s + jitter * self.first_wait_s
        return min(self.max_wait_s, self.first_wait_s * 2 ** (num_failed - 1)) * (1 + jitter) / 2
