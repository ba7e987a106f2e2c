#!/usr/bin/env python3
"""Projection and splice, forward and backward, beside two peers: benchmarks/project_splice.py [--quick]."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import torch
from machine import cpu_name
from torch import Tensor
from torch.nn import functional as F

from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.ops.project_splice import project_splice
from llava_ds.ops.row_plan import plan_rows
from llava_ds.ops.splice_cuda import why_not_fused
from llava_ds.schema import RowPlan

NUM_SAMPLES, NUM_PATCHES, VISION_WIDTH, WIDTH, VOCABULARY = 8, 576, 1024, 2048, 32_000
LENGTHS = (800, 1000)
PREFIX = 35  # tokens before the image: the system prompt of the v1 template
PAD_ID, IMAGE_ID = 0, VOCABULARY - 1  # as transformers has them: rows of the table
OFFICIAL, MASKED = "official", "masked_scatter"
BARS = {("trainable", OFFICIAL): 2.7, ("frozen", OFFICIAL): 1.0, ("trainable", MASKED): 1.5, ("frozen", MASKED): 2.1}
MEMORY_BAR = 0.5
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the largest value: sums of up to thousands of products in another order (measured 1e-6), in 8 bits of mantissa."""


@dataclass(frozen=True)
class Batch:
    """What every way gets, on one device: B samples, padded on the right, with one image each."""

    patch_features: Tensor  # [B, P, C]
    weight: Tensor  # [D, C]
    bias: Tensor  # [D]
    table: Tensor  # [V, D]
    grad: Tensor  # [B, S, D] of the output, zero at padding
    raw_ids: Tensor  # [B, S - P + 1] with IMAGE_TOKEN_INDEX for the whole image
    raw_mask: Tensor  # as raw_ids
    ids: Tensor  # [B, S] with IMAGE_ID at every patch
    mask: Tensor  # [B, S]
    plan: RowPlan

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What trains, by name."""
        return {name: t for name in ("weight", "bias", "table") if (t := getattr(self, name)).requires_grad}


Way = Callable[[Batch], Tensor]
"""From a batch to the LLM's input [B, S, D]."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="5 rounds of float32 only: under a minute.")
@click.option("--threads", type=click.IntRange(1), help="Of torch. [default: one for each core]")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
def main(quick: bool, threads: int | None, json_file: Path | None) -> None:
    """Times every way in turn on one batch and takes its peak memory, with the table trainable and frozen.

    It stops if outputs or gradients disagree, and fails where the memory bar is not met. On a GPU it also compares the
    fused kernel with library calls.
    """
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_rounds = 5 if quick else 9
    figures = describe(device, num_rounds)
    for dtype in [torch.float32] if quick else TOLERANCE:
        for name, trainable in (("trainable", True), ("frozen", False)):
            batch = make_batch(dtype, device, trainable)
            ways = ways_for(batch)
            found = differences(ways, batch) | times(ways, batch, num_rounds) | peaks(ways, batch)
            figures |= {f"{str(dtype).removeprefix('torch.')}_{name}_{key}": value for key, value in found.items()}
    if device.type == "cpu":
        figures |= judge(figures)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if "NOT" in figures.get("bar_memory", ""):  # time depends on what else runs here, memory does not
        raise click.ClickException("the memory bar is not met")


def describe(device: torch.device, num_rounds: int) -> dict[str, Any]:
    """What is measured, on what."""
    on_gpu = device.type == "cuda"
    clock = "wall time" if on_gpu else "wall time, with the CPU time of all threads beside it"
    return {
        "measured": f"forward + backward of {NUM_SAMPLES} samples of {LENGTHS[0]} to {LENGTHS[1]} rows, an image of "
        f"{NUM_PATCHES} patches in each, {VISION_WIDTH} -> {WIDTH} wide, table of {VOCABULARY}; medians of "
        f"{num_rounds} rounds taken in turn, {clock}; peak memory of a step above its inputs, as torch's "
        f"{'CUDA allocator' if on_gpu else 'profiler'} counts tensors",
        "on": f"{torch.cuda.get_device_name() if on_gpu else cpu_name()}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "fused": "; ".join(f"{dtype}: {why_not_fused(device, dtype) or 'yes'}" for dtype in TOLERANCE),
    }


def make_batch(dtype: torch.dtype, device: torch.device, trainable: bool) -> Batch:
    """The same for every call with the same arguments."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (NUM_SAMPLES, 1), generator=generator)
    num_rows = int(lengths.max())
    ids = torch.randint(1, IMAGE_ID, (NUM_SAMPLES, num_rows), generator=generator)
    mask = torch.arange(num_rows) < lengths
    ids[~mask] = PAD_ID
    ids[:, PREFIX : PREFIX + NUM_PATCHES] = IMAGE_TOKEN_INDEX
    once = torch.arange(num_rows) < PREFIX + 1
    once |= torch.arange(num_rows) >= PREFIX + NUM_PATCHES
    return Batch(
        normal(NUM_SAMPLES, NUM_PATCHES, VISION_WIDTH),
        (normal(WIDTH, VISION_WIDTH) / VISION_WIDTH**0.5).requires_grad_(),
        normal(WIDTH).requires_grad_(),
        normal(VOCABULARY, WIDTH).requires_grad_(trainable),
        normal(NUM_SAMPLES, num_rows, WIDTH) * mask.unsqueeze(2).to(device),
        ids[:, once].to(device),
        mask[:, once].to(device),
        ids.where(ids != IMAGE_TOKEN_INDEX, IMAGE_ID).to(device),
        mask.to(device),
        plan_rows(ids, mask).to(device),
    )


def ours(batch: Batch, fused: bool) -> Tensor:
    """The op, with the plan that the collator made."""
    flat = project_splice(batch.patch_features, batch.weight, batch.bias, batch.table, batch.plan, fused)
    return flat.view_as(batch.grad)


def official(batch: Batch) -> Tensor:
    """The released code's way, without its work on labels, masks and positions.

    One projection of all images; then sample by sample the ids without padding are searched for images, the text
    of all chunks is embedded in one call and split again, chunks are joined, cut at the longest length and padded.
    """
    images = F.linear(batch.patch_features, batch.weight, batch.bias)  # [B, P, D]
    num_images = 0
    joined = []
    for padded_ids, mask in zip(batch.raw_ids, batch.raw_mask, strict=True):
        ids = padded_ids[mask]
        cuts = torch.where(ids == IMAGE_TOKEN_INDEX)[0].tolist()
        begins, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(ids)]
        chunks = [ids[begin:end] for begin, end in zip(begins, ends, strict=True)]
        texts = F.embedding(torch.cat(chunks), batch.table).split([len(chunk) for chunk in chunks])
        parts = [texts[0]]
        for text in texts[1:]:
            parts += [images[num_images], text]
            num_images += 1
        joined.append(torch.cat(parts))
    max_length = batch.ids.shape[1]
    cut = [sample[:max_length] for sample in joined]
    num_rows = max(len(sample) for sample in cut)
    padded = []
    for sample in cut:
        zeros = torch.zeros(num_rows - len(sample), sample.shape[1], dtype=sample.dtype, device=sample.device)
        padded.append(torch.cat((sample, zeros)))
    return torch.stack(padded)


def masked_scatter(batch: Batch) -> Tensor:
    """transformers' way: every id is embedded, those of images too, and patches are scattered over them.

    Rows of padding hold an embedding there, not zeros.
    """
    embeds = F.embedding(batch.ids, batch.table)  # [B, S, D]
    images = torch.cat(list(F.linear(batch.patch_features, batch.weight, batch.bias)))  # [B * P, D]
    is_image = batch.ids == IMAGE_ID
    if is_image.sum() * embeds.shape[-1] != images.numel():
        raise ValueError("as many image tokens as patches are needed")
    return embeds.masked_scatter(is_image.unsqueeze(-1), images)


def ways_for(batch: Batch) -> dict[str, Way]:
    """By name; ``ours`` is the fused kernel where it can run, and then ``library`` is the op without it."""
    ways: dict[str, Way] = {"ours": partial(ours, fused=False), OFFICIAL: official, MASKED: masked_scatter}
    if why_not_fused(batch.table.device, batch.table.dtype) is None:
        ways |= {"ours": partial(ours, fused=True), "library": ways["ours"]}
    return ways


def times(ways: dict[str, Way], batch: Batch, num_rounds: int) -> dict[str, Any]:
    """Milliseconds of each way and how many times ours they are, by clock."""
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, way in ways.items():
            spent[name].append(time_step(way, batch))
    figures: dict[str, Any] = {}
    for name, rounds in spent.items():
        for clock in rounds[0]:
            figures[f"{name}_{clock}_ms"] = round(1000 * statistics.median(one[clock] for one in rounds), 3)
            if name == "ours":
                continue
            ratios = [one[clock] / of_ours[clock] for one, of_ours in zip(rounds, spent["ours"], strict=True)]
            figures[f"{name}_over_ours_{clock}"] = round(statistics.median(ratios), 2)
            figures[f"{name}_over_ours_{clock}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    if "library" in ways:
        figures["fused_is_faster"] = figures["library_over_ours_wall"] > 1
    return figures


def peaks(ways: dict[str, Way], batch: Batch) -> dict[str, float]:
    """Most memory that a step of each way holds at once beyond its inputs."""
    peak_bytes = cuda_peak_bytes if batch.table.is_cuda else tensor_peak_bytes
    return {f"{name}_peak_mib": round(peak_bytes(way, batch) / 2**20, 1) for name, way in ways.items()}


def differences(ways: dict[str, Way], batch: Batch) -> dict[str, Any]:
    """Ours from every other way: the largest difference in the output (padding aside) and in each gradient.

    As a part of the largest value.
    """
    expected = {name: results(way, batch) for name, way in ways.items()}
    found = {}
    for name in expected.keys() - {"ours"}:
        for part, value in expected[name].items():
            apart = float((expected["ours"][part] - value).abs().max() / value.abs().max())
            found[f"difference_from_{name}_{part}"] = float(f"{apart:.2g}")
    if wrong := {name: apart for name, apart in found.items() if not apart <= TOLERANCE[batch.table.dtype]}:
        raise click.ClickException(f"ways that must agree differ, as parts of the largest value: {wrong}")
    return dict(sorted(found.items()))


def results(way: Way, batch: Batch) -> dict[str, Tensor]:
    """The output without padding, and each gradient; a gradient that stays None is an error."""
    clear_gradients(batch)
    output = step(way, batch)
    gradients = {name: leaf.grad.clone() for name, leaf in batch.leaves.items() if leaf.grad is not None}
    if gradients.keys() != batch.leaves.keys():
        raise click.ClickException(f"gradients of {list(gradients)}, wanted those of {list(batch.leaves)}")
    return {"output": output.detach()[batch.mask], **gradients}


def step(way: Way, batch: Batch) -> Tensor:
    """Forward and backward into gradients that must be None; the output."""
    output = way(batch)
    output.backward(batch.grad)
    return output


def clear_gradients(batch: Batch) -> None:
    """Before every step, outside of what is measured."""
    for leaf in batch.leaves.values():
        leaf.grad = None


def time_step(way: Way, batch: Batch) -> dict[str, float]:
    """Seconds by clock: on the wall, until the device is done, and on the CPU also of all threads of this process."""
    clear_gradients(batch)
    on_gpu = batch.table.is_cuda
    clocks = {"wall": time.perf_counter} if on_gpu else {"wall": time.perf_counter, "cpu": time.process_time}
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    begins = {name: clock() for name, clock in clocks.items()}
    step(way, batch)
    wait()
    return {name: clock() - begins[name] for name, clock in clocks.items()}


def cuda_peak_bytes(way: Way, batch: Batch) -> int:
    """As the caching allocator counts tensors."""
    clear_gradients(batch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(way, batch)
    return torch.cuda.max_memory_allocated() - before


def tensor_peak_bytes(way: Way, batch: Batch) -> int:
    """From the profiler's record of every allocation and release on the CPU: exact, whatever else runs."""
    clear_gradients(batch)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it tells stderr that there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(way, batch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((one["ts"], one["args"]["Bytes"]) for one in events if one["name"] == "[memory]")
    return max(accumulate(size for _, size in changes))


def judge(figures: dict[str, Any]) -> dict[str, str]:
    """Each bar, by name: met or not, with the figure that decides."""
    verdicts = {}
    for (table, peer), bar in BARS.items():
        ratio = figures[f"float32_{table}_{peer}_over_ours_wall"]
        verdicts[f"bar_{table}_{peer}"] = f"{ratio} times as fast, bar {bar}: {met(ratio >= bar)}"
    share = figures["float32_frozen_ours_peak_mib"] / figures[f"float32_frozen_{OFFICIAL}_peak_mib"]
    verdicts["bar_memory"] = f"{share:.2f} of the official peak, bar {MEMORY_BAR}: {met(share <= MEMORY_BAR)}"
    return verdicts


def met(holds: bool) -> str:
    """The word for it."""
    return "met" if holds else "NOT met"


if __name__ == "__main__":
    main()
