"""Which samples training is measured on, and in which micro-batches: the same every time, on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_ds.config import EvalConfig
from llava_ds.data.length_table import LengthTable
from llava_ds.data.order import Items
from llava_ds.data.packing import BatchSizes
from llava_ds.data.sampler import START, StepPlan, plan_step
from llava_ds.data.sources.mixture import JoinedSources
from llava_ds.errors import ConfigError
from llava_ds.text.placement import random_words

# Of random_words; far from those of placement, which are epochs.
_HELD_OUT, _EVALUATED = 2**63, 2**63 + 1


@dataclass(frozen=True)
class EvalPlan:
    """One pass over the held-out samples, images placed as in the first epoch.

    ``steps`` are as those of training, each of at most a global batch, but no optimizer steps.
    """

    source: JoinedSources
    lengths: LengthTable
    indices: np.ndarray
    """[n] numbers in ``source`` of the samples, the longest first: little padding, and memory runs out at once."""
    steps: tuple[StepPlan, ...]

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of the whole pass."""
        return int(self.lengths.supervised(self.indices, np.zeros_like(self.indices)).sum())


def hold_out(keys: np.ndarray, seed: int, settings: EvalConfig | None) -> np.ndarray:
    """[n] bool: which samples, by their ``sample_key`` [n], are not trained on.

    Whether one is depends on (seed, id) alone with ``holdout_frac``: data that grow keep what they held out. Samples
    of one id stay together.

    Raises ConfigError when none would be held out, or none left to train on.
    """
    if settings is None or settings.path is not None or not len(keys):
        return np.zeros(len(keys), bool)
    words = random_words(seed, _HELD_OUT, keys)
    if settings.holdout_frac is not None:
        said = f"eval.holdout_frac={settings.holdout_frac:g}"
        held_out = words < np.uint64(int(settings.holdout_frac * 2.0**64))
    else:
        said = f"eval.holdout_samples={settings.holdout_samples}"
        count = min(settings.holdout_samples or 0, len(words))
        held_out = words <= np.partition(words, count - 1)[count - 1]
    if not held_out.any():
        raise ConfigError(f"{said} holds out none of {len(keys)} samples; raise it, or give eval.holdout_samples")
    if held_out.all():
        raise ConfigError(f"{said} leaves none of {len(keys)} samples to train on; lower it")
    return held_out


def plan_eval(
    source: JoinedSources,
    lengths: LengthTable,
    indices: np.ndarray,
    seed: int,
    batch: BatchSizes,
    max_samples: int | None,
) -> EvalPlan:
    """The pass over ``indices`` [n], or over ``max_samples`` of them. Raises ConfigError for one that is too long."""
    order = np.argsort(random_words(seed, _EVALUATED, lengths.rows["key"][indices]), kind="stable")
    chosen = np.sort(indices[order[:max_samples]])
    tokens = lengths.tokens(chosen, np.zeros_like(chosen))
    chosen = chosen[np.argsort(-tokens, kind="stable")]
    size = batch.global_batch_size
    steps = [
        plan_step(Items(some, np.zeros_like(some)), lengths, batch, START)
        for some in np.split(chosen, range(size, len(chosen), size))
    ]
    return EvalPlan(source, lengths, chosen, tuple(steps))
