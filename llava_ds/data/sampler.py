"""Which samples form an optimizer step, and which rank computes them: pure functions of (seed, epoch).

The global batches of an epoch are the same for every world size and micro-batch size; ranks only take shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slot:
    """One sample as it is asked for: placement depends on the epoch."""

    epoch: int
    index: int


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one optimizer step: ``micro_batches[accumulation][rank]`` lists slots.

    A list may be empty in the last step of an epoch; its rank computes a dummy then.
    """

    micro_batches: tuple[tuple[tuple[Slot, ...], ...], ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every sample of the step."""
        return tuple(slot for row in self.micro_batches for share in row for slot in share)


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """[num_samples] the permutation of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps of an epoch; the last one may hold fewer samples, so that none is dropped."""
    return math.ceil(num_samples / global_batch_size)


def plan_step(
    lengths: Sequence[int], order: np.ndarray, epoch: int, index: int, batch: BatchSizes
) -> StepPlan:
    """The plan of step ``index`` of an epoch.

    Samples are dealt by falling length, back and forth over the micro-batches, so that every one holds about
    as many tokens as the others and no rank waits for the longest.
    """
    members = order[index * batch.global_batch_size : (index + 1) * batch.global_batch_size]
    by_length = sorted((int(i) for i in members), key=lambda i: (-lengths[i], i))
    num_shares = batch.world_size * batch.grad_accum_steps
    shares: list[list[Slot]] = [[] for _ in range(num_shares)]
    for turn in range(0, len(by_length), num_shares):
        dealt = by_length[turn : turn + num_shares]
        targets = range(num_shares) if (turn // num_shares) % 2 == 0 else range(num_shares - 1, -1, -1)
        for target, sample in zip(targets, dealt, strict=False):
            shares[target].append(Slot(epoch, sample))
    rows = [
        tuple(tuple(share) for share in shares[row * batch.world_size : (row + 1) * batch.world_size])
        for row in range(batch.grad_accum_steps)
    ]
    return StepPlan(tuple(rows))


@dataclass(frozen=True)
class BatchSizes:
    """global_batch_size = micro_batch_size * world_size * grad_accum_steps."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


def plan_run(lengths: Sequence[int], seed: int, num_steps: int, batch: BatchSizes) -> Iterator[StepPlan]:
    """The plans of a whole run, epoch after epoch."""
    per_epoch = steps_per_epoch(len(lengths), batch.global_batch_size)
    for step in range(num_steps):
        epoch, index = divmod(step, per_epoch)
        if index == 0 or step == 0:
            order = epoch_order(len(lengths), seed, epoch)
        yield plan_step(lengths, order, epoch, index, batch)
