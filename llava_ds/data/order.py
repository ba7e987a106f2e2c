"""The order of an epoch: which samples, at which of their passes, one after the other.

Everything here is a pure function of (data, seed, epoch). Random numbers are PCG64's raw words, whose stream numpy
keeps the same for ever (its ``permutation`` it may change), so a run resumes the same under another numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, isfinite

import numpy as np

from llava_ds.errors import ConfigError

_PASS, _EPOCH, _BATCHES = range(3)  # what a permutation is for: none is used twice


@dataclass(frozen=True)
class Part:
    """One data set of a mixture: ``indices`` [n] int64, the global numbers of its samples.

    An epoch takes ``weight * n`` of its samples: 1 visits each once, 2 twice, 0.5 one half in one epoch and the
    other half in the next. Raises ConfigError for a weight that is not a positive number.
    """

    indices: np.ndarray
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"the weight of a data set is {self.weight}; it must be above 0. To leave a data set out, remove it."
            )

    def start(self, epoch: int) -> int:
        """Samples that earlier epochs took: where ``epoch`` begins in the endless stream of permuted passes.

        The weight counts as the decimal number that the recipe writes, exactly: 10 epochs of 0.3 are 3 passes.
        """
        return floor(epoch * Fraction(str(self.weight)) * len(self.indices))


@dataclass(frozen=True)
class Items:
    """Samples in order: ``indices`` [n] their global numbers, ``passes`` [n] how often each was visited before."""

    indices: np.ndarray
    passes: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: slice | np.ndarray) -> Items:
        return Items(self.indices[key], self.passes[key])


def permutation(size: int, *key: int) -> np.ndarray:
    """[size] int64: the numbers below ``size`` in an order that ``key``, integers >= 0, decides.

    Each number stands in the low bits of its random word: no two words are equal, so every way of sorting them gives
    the same order, and the numbers come along without an index array.
    """
    words = np.random.PCG64(key).random_raw(size)
    low_bits = np.uint64((1 << max(0, size - 1).bit_length()) - 1)
    words &= ~low_bits
    words |= np.arange(size, dtype=np.uint64)
    words.sort()
    words &= low_bits
    return words.view(np.int64)


def epoch_size(parts: Sequence[Part], epoch: int) -> int:
    """Samples of an epoch. With fractional weights it may differ by one a part between epochs."""
    return sum(part.start(epoch + 1) - part.start(epoch) for part in parts)


def epoch_order(parts: Sequence[Part], seed: int, epoch: int) -> Items:
    """The samples of an epoch, those of all parts shuffled together."""
    taken = [_take(part, seed, number, epoch) for number, part in enumerate(parts)]
    items = Items(
        np.concatenate([np.empty(0, np.int64), *(one.indices for one in taken)]),
        np.concatenate([np.empty(0, np.int64), *(one.passes for one in taken)]),
    )
    return items[permutation(len(items), seed, _EPOCH, epoch, 0)]


def _take(part: Part, seed: int, number: int, epoch: int) -> Items:
    """The next stretch of the endless stream of a part, which may span passes."""
    size, begin, end = len(part.indices), part.start(epoch), part.start(epoch + 1)
    chosen, passes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for visit in range(begin // size, -(-end // size)) if end > begin else ():
        order = permutation(size, seed, _PASS, number, visit)
        chosen.append(part.indices[order[max(0, begin - visit * size) : end - visit * size]])
        passes.append(np.full(len(chosen[-1]), visit, np.int64))
    return Items(np.concatenate(chosen), np.concatenate(passes))


def group_by_length(items: Items, tokens: np.ndarray, num_groups: int, batch_size: int, key: tuple[int, int]) -> Items:
    """The same items, every ``batch_size`` of them about equally long.

    ``num_groups * batch_size`` neighbours at a time are sorted by ``tokens`` [n] and cut into batches; then all
    batches are shuffled by ``key``, (seed, epoch). The remainder that fills no batch stays at the end, unsorted, so
    that it is not always made of the shortest.
    """
    num_whole = len(items) - len(items) % batch_size
    group = np.arange(num_whole) // (num_groups * batch_size)
    batches = np.lexsort((tokens[:num_whole], group)).reshape(-1, batch_size)  # stable: ties stay in order
    batches = batches[permutation(len(batches), key[0], _BATCHES, key[1], 0)]
    return items[np.concatenate([batches.ravel(), np.arange(num_whole, len(items))])]
