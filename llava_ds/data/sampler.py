"""The global plan of a run: which samples form each optimizer step, and which rank computes them.

It is a pure function of (data, seed, epoch) and is known before any image is decoded. The steps of an epoch are the
same for every world size and micro-batch size; ranks only take shares. So a run stops anywhere and goes on on any
number of ranks: the remaining samples are the same, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llava_ds.data.order import Items, Part, epoch_order, group_by_length
from llava_ds.data.packing import BatchSizes, share_step
from llava_ds.errors import ConfigError, DataError


@dataclass(frozen=True, order=True)
class Slot:
    """One sample as it is asked for. ``epoch`` is how often it was visited before: placement depends on it."""

    epoch: int
    index: int


@dataclass(frozen=True, order=True)
class DataState:
    """How much of the data is done: ``position`` samples of ``epoch``, and every earlier epoch."""

    epoch: int = 0
    position: int = 0


START = DataState()


class Lengths(Protocol):
    """What the plan must know of the samples."""

    def tokens(self, indices: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """[n] int64 true lengths, images included. They may depend on the pass, as placement does."""

    def images(self, indices: np.ndarray) -> np.ndarray:
        """[n] int64 numbers of images."""


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    ``slots`` are its samples in the global order. ``micro_batches[micro-step][rank]`` share them out; every rank has
    as many micro-steps, but a list may be empty where there are fewer samples than micro-batches: its rank computes
    a dummy. ``state_after`` is where the data stands when the step is done.
    """

    slots: tuple[Slot, ...]
    micro_batches: tuple[tuple[tuple[Slot, ...], ...], ...]
    state_after: DataState


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Optimizer steps of an epoch; the last one may hold fewer samples, so that none is dropped."""
    return math.ceil(num_samples / global_batch_size)


def plan_step(items: Items, lengths: Lengths, batch: BatchSizes, state_after: DataState) -> StepPlan:
    """The plan of one step of these samples. Raises ConfigError for a sample longer than ``batch.max_tokens``."""
    shares = share_step(lengths.tokens(items.indices, items.passes), lengths.images(items.indices), batch)
    slots = tuple(map(Slot, items.passes.tolist(), items.indices.tolist()))
    rows = tuple(tuple(tuple(slots[i] for i in share.tolist()) for share in row) for row in shares)
    return StepPlan(slots, rows, state_after)


def plan_run(
    parts: Sequence[Part],
    lengths: Lengths,
    seed: int,
    batch: BatchSizes,
    num_steps: int | None = None,
    start: DataState = START,
    length_groups: int = 1,
) -> Iterator[StepPlan]:
    """The plans of the next ``num_steps`` steps (without a number: for ever), epoch after epoch.

    Every step holds exactly ``global_batch_size`` samples, except the last of an epoch, which holds what is left: as
    the loss is averaged over the step's supervised tokens, those samples weigh more in their step.

    Args:
        start: ``state_after`` of the last step that was done.
        length_groups: sorts so many global batches together by length before cutting them into steps; for padded
            batches. Above 1, the order depends on ``global_batch_size``, which then must stay the same on resume.

    Raises:
        ConfigError: a sample is longer than ``batch.max_tokens``, or ``start`` lies inside a global batch.
        DataError: there are no samples, or fewer than ``start`` says are done.
    """
    if not any(len(part.indices) for part in parts):
        raise DataError("there are no samples to plan: every data set is empty. Look at data.path.")
    done, epoch, position = 0, start.epoch, start.position
    while num_steps is None or done < num_steps:
        items = _final_order(parts, lengths, seed, epoch, batch.global_batch_size, length_groups)
        _check_start(epoch, position, len(items), batch.global_batch_size, length_groups)
        while position < len(items) and (num_steps is None or done < num_steps):
            step = items[position : position + batch.global_batch_size]
            position, done = position + len(step), done + 1
            is_last = position == len(items)
            yield plan_step(step, lengths, batch, DataState(epoch + 1) if is_last else DataState(epoch, position))
        epoch, position = epoch + 1, 0


def _final_order(
    parts: Sequence[Part], lengths: Lengths, seed: int, epoch: int, global_batch_size: int, length_groups: int
) -> Items:
    items = epoch_order(parts, seed, epoch)
    if length_groups == 1:
        return items
    tokens = lengths.tokens(items.indices, items.passes)
    return group_by_length(items, tokens, length_groups, global_batch_size, (seed, epoch))


def _check_start(epoch: int, position: int, num_items: int, global_batch_size: int, length_groups: int) -> None:
    if position > num_items:
        raise DataError(
            f"{position} samples of epoch {epoch} are done, but the epoch has only {num_items}.\n"
            "  Resume with the data sets and weights of the run that wrote the checkpoint."
        )
    if length_groups > 1 and position % global_batch_size and position != num_items:
        raise ConfigError(
            f"{position} samples of epoch {epoch} are done, which is no multiple of global_batch_size="
            f"{global_batch_size}.\n  With length_groups={length_groups} the order depends on it: keep it on resume."
        )
