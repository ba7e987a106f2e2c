"""Means over questions with bootstrap intervals, and their spread over repeats."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Bootstrap:
    """Percentile intervals over ``num_resamples`` draws of the questions with replacement, a function of ``seed``."""

    num_resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def interval(self, rows: np.ndarray, statistic: Statistic) -> tuple[float, float] | None:
        """The interval of ``statistic``, a function of column means ``[..., K] -> [...]``, over ``rows`` [N, K].

        None for one row, which does not say how rows differ. The draws depend on the seed and N only, so two columns of
        one table are drawn together (paired).
        """
        num_rows = len(rows)
        if num_rows < 2:
            return None
        draws = np.random.default_rng(self.seed).multinomial(
            num_rows, np.full(num_rows, 1 / num_rows), size=self.num_resamples
        )
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(statistic(draws @ rows / num_rows), [tail, 1 - tail])
        return float(low), float(high)


def relative_score(means: np.ndarray) -> np.ndarray:
    """The candidate's mean score in per cent of the reference's; ``means`` [..., K] are reference, candidate, ..."""
    return means[..., 1] / means[..., 0] * 100


def relative_difference(means: np.ndarray) -> np.ndarray:
    """How much higher the second model's relative score is; ``means`` [..., 4] are reference, candidate of both."""
    return relative_score(means[..., 2:]) - relative_score(means[..., :2])


def only_mean(means: np.ndarray) -> np.ndarray:
    """The mean of the only column, [..., 1] -> [...]."""
    return means[..., 0]


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, which no values have not, and the sample's standard deviation (n - 1), which one value has not."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None
