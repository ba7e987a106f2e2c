"""How the samples of one optimizer step are shared among ranks and micro-batches.

Under ZeRO-3 the ranks meet in every layer of every micro-batch, so all wait for the one that computes the most.
Every rank plans the whole step for itself: integers only, ties by number, the same result on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Literal

import numpy as np

from llava_ds.errors import ConfigError

Packing = Literal["packed", "padded"]

_NUM_ROUNDS = 24
_NUM_MISSES = 3  # rounds without a swap before giving up; each pairs other bins
_NUM_PAIRS = 256  # bins at each end that a round looks at
_NUM_CANDIDATES = 48  # samples of a bin that a round looks at
_CLOSE_ENOUGH = 2000  # stop when the fullest bin is within 1/2000 of the mean


@dataclass(frozen=True)
class BatchSizes:
    """What bounds a step and its micro-batches.

    Args:
        global_batch_size: samples of an optimizer step, exactly; only the last step of an epoch has fewer.
        micro_batch_size: at most so many samples in a micro-batch.
        packing: ``packed``: a micro-batch computes the sum of its tokens; ``padded``: rows times the longest row.
        max_tokens: at most so many computed tokens in a micro-batch; a step takes more micro-steps where needed.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    packing: Packing = "packed"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "world_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")

    @property
    def grad_accum_steps(self) -> int:
        """Micro-steps of a whole step that no token budget lengthens."""
        return self.num_micro_steps(self.global_batch_size)

    def num_micro_steps(self, num_samples: int) -> int:
        """The fewest micro-steps that ``micro_batch_size`` allows for so many samples."""
        return max(1, -(-num_samples // (self.micro_batch_size * self.world_size)))


def computed_tokens(tokens: np.ndarray, packing: Packing) -> int:
    """Positions that a micro-batch of samples of these lengths computes."""
    if packing == "packed" or not len(tokens):
        return int(tokens.sum())
    return len(tokens) * int(tokens.max())


def share_step(tokens: np.ndarray, images: np.ndarray, batch: BatchSizes) -> list[list[np.ndarray]]:
    """Micro-batches of a step: ``[micro-step][rank]`` -> positions among the step's samples, rising.

    No micro-batch is empty unless there are more of them than samples. Packed, the number of images differs by at
    most one between any two of them, as far as samples of several images allow; where the token budget holds the
    step in fewer micro-steps without that, tokens alone decide.

    Args:
        tokens: [n] true length of each sample, >= 1.
        images: [n] number of images of each sample.

    Raises:
        ConfigError: a sample is longer than ``max_tokens``.
    """
    num_steps = batch.num_micro_steps(len(tokens))
    budget = batch.max_tokens
    if budget is not None and len(tokens):
        if tokens.max() > budget:
            raise ConfigError(
                f"a sample has {tokens.max()} tokens, but a micro-batch may compute at most max_tokens={budget}.\n"
                "  Raise max_tokens, or lower data.max_length so that samples are cut."
            )
        num_steps = max(num_steps, -(-int(tokens.sum()) // (batch.world_size * budget)))
    while True:
        for counted in (images, np.zeros_like(images)):
            bins = _fill(tokens, counted, num_steps * batch.world_size, batch)
            costs = [computed_tokens(tokens[one], batch.packing) for one in bins]
            if budget is None or max(costs) <= budget:
                return _to_ranks(bins, costs, batch.world_size)
        num_steps += 1  # ends: with one sample in each, everything fits


def _fill(tokens: np.ndarray, images: np.ndarray, num_bins: int, batch: BatchSizes) -> list[np.ndarray]:
    if batch.packing == "padded":
        return cut_padded(tokens, num_bins, batch.micro_batch_size)
    return fill_packed(tokens, images, num_bins, batch.micro_batch_size)


def _to_ranks(bins: list[np.ndarray], costs: list[int], world_size: int) -> list[list[np.ndarray]]:
    """Micro-batches of about equal cost meet in a micro-step. Every second one runs backwards over the ranks, so that
    a rank's sum over the step is balanced too."""
    order = np.argsort(-np.array(costs), kind="stable").reshape(-1, world_size)
    order[1::2] = order[1::2, ::-1]
    return [[np.sort(bins[number]) for number in row] for row in order]


def cut_padded(tokens: np.ndarray, num_bins: int, max_rows: int) -> list[np.ndarray]:
    """Neighbours by length, cut so that rows x longest is as small as it can be in the costliest bin."""
    order = np.argsort(-tokens, kind="stable")
    falling = tokens[order].tolist()
    low, high = 0, max_rows * max(falling, default=0)
    while low < high:  # the smallest cost at which max_rows and num_bins hold every sample
        middle = (low + high) // 2
        if sum(_cut_sizes(falling, num_bins, max_rows, middle)) == len(falling):
            high = middle
        else:
            low = middle + 1
    return np.split(order, np.cumsum(_cut_sizes(falling, num_bins, max_rows, high))[:-1])


def _cut_sizes(falling: Sequence[int], num_bins: int, max_rows: int, max_cost: int) -> list[int]:
    """[num_bins] rows that bin after bin takes from the longest down, leaving a sample for every later bin."""
    sizes, start = [], 0
    for later in range(num_bins - 1, -1, -1):
        left = len(falling) - start
        rows = min(max_rows, max_cost // falling[start], max(1, left - later)) if left else 0
        sizes.append(rows)
        start += rows
    return sizes


def fill_packed(tokens: np.ndarray, images: np.ndarray, num_bins: int, max_samples: int) -> list[np.ndarray]:
    """Bins of about as many tokens and, within one, as many images.

    Text-only samples, whose lengths differ the most, are dealt first, then those with images; each kind the longest
    first, to the bin that holds the fewest tokens. Swaps between full and empty bins even out the rest.
    """
    num_with_images = int(np.count_nonzero(images))
    least, more = divmod(num_with_images, num_bins)  # `more` bins hold one more sample with images
    order = np.argsort(-tokens, kind="stable")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = max_samples - least
    _deal(order[images[order] == 0], tokens, bins, [room] * num_bins, room, num_bins - more)
    limits = [max_samples - len(one) for one in bins]
    top, num_top = (least + 1, more) if more else (least, num_bins)
    _deal(order[images[order] > 0], tokens, bins, limits, top, num_top)

    width = min(max_samples, max(map(len, bins)) + 1)
    table = np.full((num_bins, width), -1)  # -1: a free place, a sample of no tokens to the swaps
    for number, members in enumerate(bins):
        table[number, : len(members)] = members
    costs, counts = np.append(tokens, 0), np.append(images, 0)
    if counts.max() > 1:
        _level(table, counts, np.zeros_like(counts))
    _level(table, costs, counts)
    return [row[row >= 0] for row in table]


def _deal(
    items: np.ndarray, tokens: np.ndarray, bins: list[list[int]], limits: list[int], top: int, num_top: int
) -> None:
    """Appends each item to the bin of the fewest tokens that may take one more.

    A bin takes at most its limit of these items and at most ``top``; only ``num_top`` bins reach ``top``.
    """
    num_bins = len(bins)
    # load * num_bins + number: one integer orders by load, then by number
    heap = [int(tokens[members].sum()) * num_bins + number for number, members in enumerate(bins)]
    heapify(heap)
    taken = [0] * num_bins
    for item, size in zip(items.tolist(), tokens[items].tolist(), strict=True):
        while True:
            number = heap[0] % num_bins
            reaches_top = taken[number] + 1 == top
            if taken[number] < min(limits[number], top) and not (reaches_top and num_top == 0):
                break
            heappop(heap)
        heapreplace(heap, heap[0] + size * num_bins)
        bins[number].append(item)
        taken[number] += 1
        num_top -= reaches_top


def _level(table: np.ndarray, costs: np.ndarray, guarded: np.ndarray) -> None:
    """Swaps samples between bins until their costs are about equal, without widening the range of guarded counts.

    Each round pairs the fullest bins with the emptiest and makes, in every pair, the one swap that brings the two
    closest. It never empties a bin: to move the only sample away would not bring the two closer.
    """
    num_pairs = min(len(table) // 2, _NUM_PAIRS)
    columns = np.linspace(0, table.shape[1] - 1, min(table.shape[1], _NUM_CANDIDATES)).astype(int)
    misses = 0
    for _ in range(_NUM_ROUNDS):
        loads = costs[table].sum(axis=1)
        if misses > _NUM_MISSES or (loads.max() * len(loads) - loads.sum()) * _CLOSE_ENOUGH <= loads.sum():
            return
        order = np.argsort(loads, kind="stable")
        low, high = np.roll(order[:num_pairs], misses), order[::-1][:num_pairs]
        swapped = _swap_best(table, costs, guarded, high, low, columns)
        misses = 0 if swapped else misses + 1


def _swap_best(
    table: np.ndarray, costs: np.ndarray, guarded: np.ndarray, high: np.ndarray, low: np.ndarray, columns: np.ndarray
) -> int:
    """The best swap of each pair of bins, ``high[i]`` and ``low[i]``, where one helps; returns how many it made."""
    mine, theirs = table[high][:, columns], table[low][:, columns]  # [pairs, columns]
    counts = guarded[table].sum(axis=1)
    gap = costs[table[high]].sum(axis=1) - costs[table[low]].sum(axis=1)
    left = np.abs(gap[:, None, None] - 2 * (costs[mine][:, :, None] - costs[theirs][:, None, :]))
    moved = guarded[mine][:, :, None] - guarded[theirs][:, None, :]
    least, most = counts.min(), counts.max()
    after_high, after_low = counts[high][:, None, None] - moved, counts[low][:, None, None] + moved
    allowed = (after_high >= least) & (after_low <= most) & (after_high <= most) & (after_low >= least)
    left = np.where(allowed, left, np.iinfo(np.int64).max).reshape(len(high), -1)
    best = left.argmin(axis=1)
    helps = np.flatnonzero(left[np.arange(len(high)), best] < gap)
    first, second = columns[best[helps] // len(columns)], columns[best[helps] % len(columns)]
    ours, others = (high[helps], first), (low[helps], second)
    table[ours], table[others] = table[others], table[ours]
    return len(helps)
