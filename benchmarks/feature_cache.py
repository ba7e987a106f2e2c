#!/usr/bin/env python3
"""Image path of a training epoch with and without ``data.feature_cache``: benchmarks/feature_cache.py [--quick]."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import cpu_name
from PIL import Image

from llava_ds.data.feature_cache import open_feature_cache
from llava_ds.data.images import ImageTransform
from llava_ds.data.order import permutation
from llava_ds.models.vision_tower import build_tower

TOWER = "ViT-B-32"
PICTURE_SIZE = (640, 480)  # of a COCO picture


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few pictures and repeats: under a minute.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
def main(quick: bool, json_file: Path | None) -> None:
    """Times one epoch over pictures both ways, in turn, and counts the values that differ."""
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    figures = measure(*((32, 3) if quick else (256, 7)), micro_batch_size=8)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def measure(num_pictures: int, num_repeats: int, micro_batch_size: int) -> dict[str, Any]:
    """The figures by name, each with its unit in the name or in the text."""
    torch.manual_seed(0)
    tower = build_tower(TOWER, None, -2)
    transform = ImageTransform.for_tower(tower.spec, "square")
    shape = (tower.spec.num_patches, tower.spec.width)

    def compute(files: Sequence[Path]) -> torch.Tensor:
        return tower(torch.stack([transform(file) for file in files]))

    with tempfile.TemporaryDirectory() as folder:
        files = write_pictures(Path(folder), num_pictures)
        begin = time.perf_counter()
        cache = open_feature_cache(Path(folder) / "cache", files, shape, compute, batch_size=32, log=lambda _: None)
        fill_s = time.perf_counter() - begin
        cache_bytes = sum(file.stat().st_size for file in (Path(folder) / "cache").iterdir())

        def read(batch: Sequence[Path]) -> torch.Tensor:
            return torch.stack([cache(file) for file in batch])

        seconds: dict[str, list[float]] = {"computed": [], "cached": []}
        for epoch in range(num_repeats):
            batches = plan_batches(files, epoch, micro_batch_size)
            for name, features in (("computed", compute), ("cached", read)):
                seconds[name].append(time_epoch(features, batches))
        # In the batches of the fill, and in smaller ones, where a matrix product may sum in another order.
        differing = {
            f"differing_values_batches_of_{size}": compare(compute, read, split(files, size)) for size in (32, 8, 2, 1)
        }

    computed_s, cached_s = (statistics.median(seconds[name]) for name in ("computed", "cached"))
    ratios = [a / b for a, b in zip(seconds["computed"], seconds["cached"], strict=True)]
    return {
        "measured": f"decode, resize and tower against cached reads (warm page cache), {num_pictures} JPEG pictures of "
        f"{PICTURE_SIZE[0]}x{PICTURE_SIZE[1]}, {TOWER} with random weights, fp32, micro-batches of {micro_batch_size}, "
        f"no loader workers, median of {num_repeats} epochs each, taken in turn",
        "on": f"{cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "epoch_computed_s": round(computed_s, 4),
        "epoch_cached_s": round(cached_s, 4),
        "computed_over_cached": round(computed_s / cached_s, 1),
        "computed_over_cached_range": [round(min(ratios), 1), round(max(ratios), 1)],
        "fill_once_s": round(fill_s, 4),
        "cache_bytes_per_picture": round(cache_bytes / num_pictures),
        **differing,
    }


def write_pictures(folder: Path, num_pictures: int) -> list[Path]:
    """Smooth random pictures, which a JPEG decoder works on as on photographs."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(num_pictures):
        coarse = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        files.append(folder / f"{number}.jpg")
        coarse.resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def plan_batches(files: Sequence[Path], epoch: int, size: int) -> list[Sequence[Path]]:
    """The files in the order of an epoch, ``size`` at a time."""
    return split([files[number] for number in permutation(len(files), 0, epoch)], size)


def split(files: Sequence[Path], size: int) -> list[Sequence[Path]]:
    """The files in their order, ``size`` at a time."""
    return [files[start : start + size] for start in range(0, len(files), size)]


def time_epoch(features: Callable[[Sequence[Path]], torch.Tensor], batches: Sequence[Sequence[Path]]) -> float:
    """Seconds to get the features of every batch."""
    begin = time.perf_counter()
    for batch in batches:
        features(batch)
    return time.perf_counter() - begin


def compare(
    compute: Callable[[Sequence[Path]], torch.Tensor],
    read: Callable[[Sequence[Path]], torch.Tensor],
    batches: Sequence[Sequence[Path]],
) -> str:
    """How many values of the pictures are not bit-equal, and by how much they differ at most."""
    num_values, num_differing, largest, scale = 0, 0, 0.0, 0.0
    for batch in batches:
        ours, theirs = read(batch), compute(batch)
        num_values += ours.numel()
        num_differing += int((ours.view(torch.int32) != theirs.view(torch.int32)).sum())
        largest = max(largest, float((ours - theirs).abs().max()))
        scale = max(scale, float(theirs.abs().max()))
    return f"{num_differing} of {num_values}; largest difference {largest:.1e} beside values up to {scale:.1f}"


if __name__ == "__main__":
    main()
