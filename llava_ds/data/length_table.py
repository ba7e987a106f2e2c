"""What is known of every record before any image is decoded: its lengths, or why it cannot be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_ds.text.placement import is_image_first

GOOD = -1
# One row a record; of the pairs, the first is for the image before the question, the second for it after.
ROW = np.dtype(
    [
        ("num_tokens", "i4", 2), ("num_supervised", "i4", 2), ("num_images", "i4", 2), ("num_cut_tokens", "i4"),
        ("key", "u8"), ("reason", "i2"),
    ]
)


@dataclass(frozen=True)
class LengthTable:
    """What is known of every record, by its number; see ``ROW``. ``rows["reason"]`` is GOOD or a number of reasons."""

    rows: np.ndarray
    reasons: tuple[str, ...]
    random_placement: bool
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def good(self) -> np.ndarray:
        """Numbers of the records that can be trained on."""
        return np.flatnonzero(self.rows["reason"] == GOOD)

    def skipped(self) -> Counter[str]:
        """How many records cannot, by reason."""
        numbers, counts = np.unique(self.rows["reason"], return_counts=True)
        return Counter({self.reasons[n]: int(c) for n, c in zip(numbers, counts, strict=True) if n != GOOD})

    def num_cut(self) -> int:
        """How many good records lose their end because they are too long."""
        return int(((self.rows["num_cut_tokens"] > 0) & (self.rows["reason"] == GOOD)).sum())

    def tokens(self, indices: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Tokens of records [n] in their passes [n], images counted."""
        return self._of("num_tokens", indices, passes)

    def supervised(self, indices: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Supervised tokens of records [n] in their passes [n]."""
        return self._of("num_supervised", indices, passes)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Images of records [n]; the larger number where it depends on the order that fits."""
        return self.rows["num_images"][indices].max(axis=1).astype(np.int64)

    def _of(self, field: str, indices: np.ndarray, passes: np.ndarray) -> np.ndarray:
        rows = self.rows[indices]
        if not self.random_placement:
            return rows[field][:, 0].astype(np.int64)
        first = is_image_first(self.seed, passes, rows["key"])
        return np.where(first, rows[field][:, 0], rows[field][:, 1]).astype(np.int64)


def join_lengths(parts: Sequence[LengthTable]) -> LengthTable:
    """The lengths of several sources after one another."""
    if len(parts) == 1:
        return parts[0]
    reasons = tuple(dict.fromkeys(reason for part in parts for reason in part.reasons))
    rows = np.concatenate([part.rows for part in parts])
    start = 0
    for part in parts:
        renumber = np.array([*(reasons.index(reason) for reason in part.reasons), GOOD])
        rows["reason"][start : start + len(part)] = renumber[part.rows["reason"]]
        start += len(part)
    return LengthTable(rows, reasons, parts[0].random_placement, parts[0].seed)
