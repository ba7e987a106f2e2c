#!/usr/bin/env python3
"""Work that ranks lose to padding and waiting, beside peers: benchmarks/packing.py [--quick] [--plot FILE]."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import cpu_name

from llava_ds.data.order import Items, Part, epoch_order, group_by_length, permutation
from llava_ds.data.packing import BatchSizes, Packing, computed_tokens, share_step
from llava_ds.data.sampler import DataState, plan_run, plan_step

MAX_LENGTH = 2048
SAMPLES_PER_RANK = 16
WORLD_SIZE = 8
LENGTH_GROUPS = 50
MicroSteps = Iterator[list[np.ndarray]]
"""Micro-step after micro-step: the samples of each rank."""


@dataclass(frozen=True)
class Table:
    """Lengths that do not depend on the pass."""

    token_table: np.ndarray
    image_table: np.ndarray
    text_table: np.ndarray  # before images and cut: what the official sampler goes by

    def tokens(self, indices: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """[n] true lengths."""
        return self.token_table[indices]

    def images(self, indices: np.ndarray) -> np.ndarray:
        """[n] numbers of images."""
        return self.image_table[indices]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A quarter of the data and up to 512 ranks.")
@click.option("--lengths", type=click.Path(exists=True, path_type=Path, dir_okay=False),
              help="An .npz with text_tokens and num_images; an image counts as 1 text token. "
              "[default: lengths drawn like those of LLaVA's 665k mix]")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draws waste and plan time there (PNG).")
def main(quick: bool, lengths: Path | None, json_file: Path | None, plot: Path | None) -> None:
    """Plans one epoch each way at 8 ranks, then steps of 16 samples a rank at more and more ranks.

    Waste = 1 - useful tokens / sum over micro-steps of ranks x the most tokens that any rank computes in it.
    """
    for file in (json_file, plot):
        if file and not file.parent.is_dir():
            raise click.BadParameter(f"{file}: there is no folder {file.parent}; create it first")
    table, origin = (read_lengths(lengths), lengths.name) if lengths else (draw_lengths(30_000), "drawn from a seed")
    if quick:
        table = Table(*(column[: len(column) // 4] for column in vars(table).values()))
    rank_counts = [2**power for power in range(3, 10 if quick else 13)]
    scaling = {world: simulate(table, world, 4 if quick else 12) for world in rank_counts}
    figures = {
        "measured": f"waste over one epoch of {len(table.token_table)} samples ({origin}, 576 tokens an image, cut at "
        f"{MAX_LENGTH}), {WORLD_SIZE} ranks, {SAMPLES_PER_RANK} samples a rank and step; the scaling figures on "
        "steps drawn from the same lengths; plan times: median, the whole step planned by one process",
        "on": f"{cpu_name()}, one thread, numpy {np.__version__}",
        **compare(table),
    }
    for world, one in scaling.items():
        figures |= {f"ranks_{world}_{name}": value for name, value in one.items()}
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if plot:
        draw(plot, scaling)


def read_lengths(file: Path) -> Table:
    """The lengths of a file."""
    stored = np.load(file)
    return _table(stored["text_tokens"].astype(np.int64), stored["num_images"].astype(np.int64))


def draw_lengths(num_samples: int) -> Table:
    """94 % conversations on an image and 6 % without one, which are longer and vary more."""
    rng = np.random.default_rng(0)
    images = (rng.random(num_samples) < 0.94).astype(np.int64)
    text = np.exp(rng.normal(np.where(images, 5.06, 6.85), np.where(images, 0.48, 0.75)))
    return _table(np.clip(text.astype(np.int64), 58, 5500), images)


def _table(text: np.ndarray, images: np.ndarray) -> Table:
    return Table(np.minimum(text + 575 * images, MAX_LENGTH), images, text)


def compare(table: Table) -> dict[str, Any]:
    """The figures at 8 ranks."""
    figures: dict[str, Any] = {}
    size = WORLD_SIZE * SAMPLES_PER_RANK
    order = epoch_order([Part(np.arange(len(table.token_table)))], 0, 0)
    by_length = group_by_length(order, table.tokens(order.indices, order.passes), LENGTH_GROUPS, size, (0, 0))
    ways: dict[str, tuple[MicroSteps, Packing]] = {
        "random_padded": (deal_in_order(order.indices, WORLD_SIZE), "padded"),
        "official_by_modality_padded": (deal_in_order(official_order(table), WORLD_SIZE), "padded"),
        f"length_groups_{LENGTH_GROUPS}_padded": (deal_in_order(by_length.indices, WORLD_SIZE), "padded"),
        f"length_groups_{LENGTH_GROUPS}_ours_padded": (ours(table, 16, "padded", LENGTH_GROUPS), "padded"),
        "ours_padded": (ours(table, 16, "padded"), "padded"),
        "random_packed": (deal_in_order(order.indices, WORLD_SIZE), "packed"),
        "ours_packed": (ours(table, 16), "packed"),
        "ours_packed_4_micro_steps_of_4": (ours(table, 4), "packed"),
        "ours_packed_budget_3600_tokens": (ours(table, 16, max_tokens=3600), "packed"),
    }
    for name, (micro_steps, packing) in ways.items():
        steps = list(micro_steps)
        figures[f"waste_percent_{name}"] = round(100 * waste(table, steps, packing), 3)
        figures[f"most_images_apart_{name}"] = max(
            int(np.ptp([table.image_table[rank].sum() for rank in step])) for step in steps if min(map(len, step))
        )
    shares = [100 - figures[f"waste_percent_{name}"] for name in ("ours_packed", "official_by_modality_padded")]
    figures["official_computed_tokens_over_ours"] = round(shares[0] / shares[1], 2)
    return figures


def waste(table: Table, micro_steps: list[list[np.ndarray]], packing: Packing) -> float:
    """Share of the work that is padding, or waiting for the rank that computes the most."""
    useful = sum(int(table.token_table[rank].sum()) for step in micro_steps for rank in step)
    computed = sum(
        len(step) * max(computed_tokens(table.token_table[rank], packing) for rank in step) for step in micro_steps
    )
    return 1 - useful / computed


def ours(
    table: Table, micro_batch_size: int, packing: Packing = "packed", groups: int = 1, max_tokens: int | None = None
) -> MicroSteps:
    """One epoch as the trainer plans it."""
    batch = BatchSizes(WORLD_SIZE * SAMPLES_PER_RANK, micro_batch_size, WORLD_SIZE, packing, max_tokens)
    for plan in plan_run([Part(np.arange(len(table.token_table)))], table, 0, batch, length_groups=groups):
        for row in plan.micro_batches:
            yield [np.array([slot.index for slot in rank], np.int64) for rank in row]
        if plan.state_after.epoch > 0:
            return


def deal_in_order(order: np.ndarray, world_size: int) -> MicroSteps:
    """Each rank takes the next samples, as a plain sampler hands them out; the last step is shared evenly."""
    size = world_size * SAMPLES_PER_RANK
    for start in range(0, len(order), size):
        yield np.array_split(order[start : start + size], world_size)


def official_order(table: Table) -> np.ndarray:
    """LLaVA's ``group_by_modality_length``, from its description: samples with and without images apart; of each, a
    random megabatch (all ranks' samples of a step) is sorted by length of its text and dealt to the ranks, each
    sample to the one of the shortest sum that has room; megabatches are shuffled; the two left over go last."""
    size = WORLD_SIZE * SAMPLES_PER_RANK
    whole, left = [], []
    for number, members in enumerate((np.flatnonzero(table.image_table), np.flatnonzero(table.image_table == 0))):
        members = members[permutation(len(members), 0, number)]
        for start in range(0, len(members), size):
            one = members[start : start + size]
            one = one[np.argsort(-table.text_table[one], kind="stable")]
            whole.append(_even_chunks(one, table.text_table)) if len(one) == size else left.append(one)
    shuffled = [whole[number] for number in permutation(len(whole), 0, 2)]
    return np.concatenate([*shuffled, np.sort(np.concatenate([np.empty(0, np.int64), *left]))])


def _even_chunks(members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    chunks: list[list[int]] = [[] for _ in range(WORLD_SIZE)]
    sums = [0.0] * WORLD_SIZE
    for member in members.tolist():
        shortest = sums.index(min(sums))
        chunks[shortest].append(member)
        sums[shortest] = sums[shortest] + int(lengths[member]) if len(chunks[shortest]) < SAMPLES_PER_RANK else np.inf
    return np.array([member for chunk in chunks for member in chunk])


def simulate(table: Table, world_size: int, num_steps: int) -> dict[str, Any]:
    """Waste and plan time of steps of 16 samples a rank, and the waste of the same steps dealt in order."""
    size = world_size * SAMPLES_PER_RANK
    rng = np.random.default_rng(world_size)
    batch = BatchSizes(size, SAMPLES_PER_RANK, world_size)
    planned: list[list[np.ndarray]] = []
    dealt: list[list[np.ndarray]] = []
    plan_s = []
    for _ in range(num_steps):
        drawn = rng.integers(0, len(table.token_table), size)
        items = Items(drawn, np.zeros(size, np.int64))
        plan_s.append(time_call(lambda items=items: plan_step(items, table, batch, DataState())))
        (row,) = share_step(table.token_table[drawn], table.image_table[drawn], batch)
        planned.append([drawn[rank] for rank in row])
        dealt += islice(deal_in_order(drawn, world_size), 1)
    return {
        "waste_percent_ours_packed": round(100 * waste(table, planned, "packed"), 3),
        "waste_percent_random_packed": round(100 * waste(table, dealt, "packed"), 3),
        "waste_percent_random_padded": round(100 * waste(table, dealt, "padded"), 3),
        "most_images_apart": max(int(np.ptp([table.image_table[rank].sum() for rank in step])) for step in planned),
        "plan_ms_a_step": round(1000 * float(np.median(plan_s)), 2),
        "plan_ms_a_step_most": round(1000 * max(plan_s), 2),
    }


def time_call(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def draw(file: Path, scaling: dict[int, dict[str, Any]]) -> None:
    """Two panels over the number of ranks: waste, and plan time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = list(scaling)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("random_padded", "random, padded"), ("random_packed", "random, packed"),
                        ("ours_packed", "llava_ds, packed")):  # fmt: skip
        left.plot(ranks, [one[f"waste_percent_{name}"] for one in scaling.values()], marker="o", label=label)
    left.axhline(1.0, color="grey", linestyle="--", linewidth=1, label="1 %")
    left.set(yscale="log", ylabel="waste (% of computed tokens)", title="Padding and waiting")
    left.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    left.legend(loc=(0.6, 0.18))
    right.plot(ranks, [one["plan_ms_a_step"] for one in scaling.values()], marker="o", color="C2")
    right.set(yscale="log", ylabel="ms a step (one process plans it all)", title="Time to plan")
    for axes in (left, right):
        axes.set(xscale="log", xlabel=f"ranks ({SAMPLES_PER_RANK} samples a rank and step)")
        axes.set_xticks(ranks, [f"{rank:,}" for rank in ranks], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
