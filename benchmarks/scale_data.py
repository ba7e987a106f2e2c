"""Part of thousand_ranks.py: the order of samples, planned by every rank for all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash
from scale_child import Figures, check, timed

from llava_ds.data.length_table import GOOD, ROW, LengthTable
from llava_ds.data.order import Part
from llava_ds.data.packing import BatchSizes
from llava_ds.data.sampler import DataState, StepPlan, plan_run, steps_per_epoch

SAMPLES_PER_RANK = 8
NUM_STEPS = 5
_MAX_LENGTH, _IMAGE_TOKENS = 2048, 576


def draw_table(num_samples: int, lengths: Path | None) -> LengthTable:
    """So many samples with the lengths of a file (taken again where it has fewer), or drawn like them.

    Where the image stands is random, as in the paper: the plan must ask for it in every pass.
    """
    rng = np.random.default_rng(0)
    if lengths:
        stored = np.load(lengths)
        taken = rng.integers(0, len(stored["text_tokens"]), num_samples)
        text, images = stored["text_tokens"][taken].astype(np.int64), stored["num_images"][taken].astype(np.int64)
    else:
        images = (rng.random(num_samples) < 0.94).astype(np.int64)
        text = np.exp(rng.normal(np.where(images, 5.06, 6.85), np.where(images, 0.48, 0.75))).clip(58, 5500)
    rows = np.zeros(num_samples, ROW)
    rows["num_tokens"] = np.minimum(text + (_IMAGE_TOKENS - 1) * images, _MAX_LENGTH).astype(np.int32)[:, None]
    rows["num_images"] = images[:, None]
    rows["key"] = rng.integers(0, 1 << 63, num_samples)
    rows["reason"] = GOOD
    return LengthTable(rows, (), random_placement=True, seed=0)


def measure_data(table: LengthTable, num_ranks: int, global_batch_size: int) -> tuple[Figures, list[str]]:
    """The figures of one rank, and a digest of every step that was planned, which no number of ranks changes."""
    table = LengthTable(table.rows.copy(), (), random_placement=True, seed=0)  # a rank's own, counted as its memory
    figures: Figures = {}
    parts = [Part(table.good())]
    batch = BatchSizes(global_batch_size, SAMPLES_PER_RANK, num_ranks)
    last_step = steps_per_epoch(len(table), global_batch_size) - 1
    first = min(NUM_STEPS, last_step)

    run = plan_run(parts, table, 0, batch)
    with timed(figures, "data_first_step_cpu_s"):
        plans = [next(run)]
    with timed(figures, "data_step_cpu_ms", first - 1):
        plans += [next(run) for _ in range(first - 1)]
    middle = plans[first // 2].state_after
    again = list(plan_run(parts, table, 0, batch, first - first // 2 - 1, middle))
    check(again == plans[first // 2 + 1 :], f"{num_ranks} ranks: what follows {middle} is not what followed before")
    end = list(plan_run(parts, table, 0, batch, 2, DataState(0, last_step * global_batch_size)))
    check(end[0].state_after == DataState(1), f"{num_ranks} ranks: the epoch does not end with its last step")
    for plan in plans + end:
        check_shares(plan, num_ranks)
    num_left = len(table) - last_step * global_batch_size
    check(len(end[0].slots) == num_left, f"the last step has {len(end[0].slots)} samples, {num_left} are left")
    figures["data_waste_percent"] = 100 * _waste(plans, table)
    return figures, [_digest(plan) for plan in plans + end]


def check_shares(plan: StepPlan, num_ranks: int) -> None:
    """All ranks' shares are the step's samples, each once, and every rank has as many micro-batches."""
    shares = [[slot for row in plan.micro_batches for slot in row[rank]] for rank in range(num_ranks)]
    check(all(len(row) == num_ranks for row in plan.micro_batches), f"a micro-step is not of {num_ranks} ranks")
    taken = sorted(slot for share in shares for slot in share)
    check(taken == sorted(plan.slots), "the ranks' shares are not the global batch")
    check(len(set(taken)) == len(taken), "a sample stands twice in a global batch")
    num_empty = sum(not share for row in plan.micro_batches for share in row)
    num_batches = num_ranks * len(plan.micro_batches)
    check(num_empty == max(0, num_batches - len(plan.slots)), f"{num_empty} of {num_batches} micro-batches are empty")


def _waste(plans: Iterable[StepPlan], table: LengthTable) -> float:
    """Share of the work that is waiting for the rank that has the most tokens in a micro-step."""
    useful = computed = 0
    for plan in plans:
        for row in plan.micro_batches:
            tokens = [
                int(table.tokens(np.array([s.index for s in share]), np.array([s.epoch for s in share])).sum())
                for share in row
            ]
            useful, computed = useful + sum(tokens), computed + len(tokens) * max(tokens)
    return 1 - useful / computed


def _digest(plan: StepPlan) -> str:
    return xxhash.xxh3_128_hexdigest(repr((plan.slots, plan.state_after)).encode())
