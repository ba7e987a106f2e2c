"""How long samples are, and what padding and waiting would cost: figures for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_ds.data.order import Part
from llava_ds.data.packing import BatchSizes, Packing, computed_tokens
from llava_ds.data.sampler import StepPlan, plan_run

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
LENGTH_GROUPS = 50
_NUM_BINS = 64
_NUM_STEPS = 200  # their order is random, so the first ones stand for all


@dataclass(frozen=True)
class LengthColumns:
    """Tokens, supervised tokens and images of samples, each [n] int64. The lengths that ``plan_run`` asks for."""

    num_tokens: np.ndarray
    num_supervised: np.ndarray
    num_images: np.ndarray

    def tokens(self, indices: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """The same in every pass: the order of image and question moves a token or two."""
        return self.num_tokens[indices]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """[n] numbers of images."""
        return self.num_images[indices]


def describe_lengths(columns: LengthColumns, max_length: int) -> dict[str, Any] | None:
    """Percentiles, means and totals of the columns, a histogram, and the share of supervised tokens.

    The histogram has bins of equal width from 0 to the larger of ``max_length`` and the longest sample; a length on an
    edge counts in the bin above it, the last edge in the last bin. None when there is no sample.
    """
    if not len(columns.num_tokens):
        return None
    named = {"tokens": columns.num_tokens, "supervised": columns.num_supervised, "images": columns.num_images}
    width = -(-max(max_length, int(columns.num_tokens.max())) // _NUM_BINS)
    edges = np.arange(_NUM_BINS + 1) * width
    return {
        **{name: _describe(values) for name, values in named.items()},
        "supervised_frac": float(columns.num_supervised.sum() / columns.num_tokens.sum()),
        "histogram": {
            "edges": edges.tolist(),
            "tokens": np.histogram(columns.num_tokens, edges)[0].tolist(),
            "supervised": np.histogram(columns.num_supervised, edges)[0].tolist(),
        },
    }


def _describe(values: np.ndarray) -> dict[str, Any]:
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {
        "percentiles": {str(p): int(value) for p, value in zip(PERCENTILES, found, strict=True)},
        "mean": float(values.mean()),
        "total": int(values.sum()),
    }


def expected_waste(columns: LengthColumns, world_size: int, global_batch_size: int) -> dict[str, Any] | None:
    """The share of computed positions that is padding or waiting, for three ways to form micro-batches.

    1 - useful tokens / (sum over micro-steps of ranks x the most tokens that any rank computes in it), over one epoch
    or its first 200 steps, with one micro-step a step. ``padded_by_length`` sorts 50 global batches together by
    length. None when there is no sample.
    """
    if not len(columns.num_tokens):
        return None
    parts = (Part(np.arange(len(columns.num_tokens))),)
    num_steps = min(_NUM_STEPS, -(-len(columns.num_tokens) // global_batch_size))

    def waste(packing: Packing, length_groups: int) -> float:
        batch = BatchSizes(global_batch_size, -(-global_batch_size // world_size), world_size, packing)
        plans = plan_run(parts, columns, 0, batch, num_steps, length_groups=length_groups)
        return waste_of(list(plans), columns, world_size, packing)

    return {
        "packed": waste("packed", 1),
        "padded": waste("padded", 1),
        "padded_by_length": waste("padded", LENGTH_GROUPS),
        "length_groups": LENGTH_GROUPS,
        "world_size": world_size,
        "global_batch_size": global_batch_size,
        "num_steps": num_steps,
    }


def waste_of(plans: Sequence[StepPlan], columns: LengthColumns, world_size: int, packing: Packing) -> float:
    """The share of computed positions of these steps that no token fills."""
    useful = paid = 0
    for plan in plans:
        for row in plan.micro_batches:
            lengths = [columns.num_tokens[[slot.index for slot in share]] for share in row]
            useful += sum(int(one.sum()) for one in lengths)
            paid += world_size * max(computed_tokens(one, packing) for one in lengths)
    return 1 - useful / paid
