#!/usr/bin/env python3
"""From a JPEG file to pixel values, ours against the official path: benchmarks/images.py [--quick]."""

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
import PIL
import torch
import transformers
from machine import cpu_name
from PIL import Image
from transformers.models.clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_ds.data.images import ImageTransform

IMAGE_SIZE = 336
PICTURE_SIZE = (640, 480)  # of a COCO picture
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OFFICIAL = "official_reference"

PathToPixels = Callable[[Path], torch.Tensor]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few pictures and repeats: seconds.")
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Of the JPEG files.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
def main(quick: bool, quality: int, json_file: Path | None) -> None:
    """Times the ways through the same files in turn, in CPU seconds of one thread, and compares their pixels."""
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    torch.set_num_threads(1)
    figures = measure(*((8, 9) if quick else (32, 41)), quality)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def measure(num_pictures: int, num_repeats: int, quality: int) -> dict[str, Any]:
    """The figures by name, each with its unit in the name or in the text."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_pictures(Path(folder), num_pictures, quality)
        kib = statistics.mean(file.stat().st_size for file in files) / 1024
        figures = {
            "measured": f"CPU-ms a picture from a JPEG file (warm page cache) to pixel values at {IMAGE_SIZE} px, "
            f"{num_pictures} pictures of {PICTURE_SIZE[0]}x{PICTURE_SIZE[1]}, quality {quality}, {kib:.0f} KiB each, "
            f"median of {num_repeats} rounds taken in turn, one thread",
            "on": f"{cpu_name()}, torch {torch.__version__}, Pillow {PIL.__version__}, "
            f"transformers {transformers.__version__}, numpy {np.__version__}",
        }
        for aspect in ("pad", "square"):
            figures |= compare_aspect(aspect, files, num_repeats)
    return figures


def compare_aspect(aspect: str, files: Sequence[Path], num_repeats: int) -> dict[str, Any]:
    """Milliseconds of each way, our share of them, and how far the pixels are apart."""
    ways = ways_to_pixels(aspect)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_repeats):
        for name, way in ways.items():
            seconds[name].append(cpu_seconds(way, files))
    figures: dict[str, Any] = {}
    for name, spent in seconds.items():
        figures[f"{aspect}_{name}_ms"] = round(1000 * statistics.median(spent) / len(files), 3)
    for name in seconds.keys() - {"ours"}:
        ratios = [peer / ours for peer, ours in zip(seconds[name], seconds["ours"], strict=True)]
        figures[f"{aspect}_{name}_over_ours"] = round(statistics.median(ratios), 2)
        figures[f"{aspect}_{name}_over_ours_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    figures[f"{aspect}_largest_difference_levels_of_255"] = largest_difference(ways["ours"], ways[OFFICIAL], files)
    return dict(sorted(figures.items()))


def ways_to_pixels(aspect: str) -> dict[str, PathToPixels]:
    """Ours and its peers, each from a file to [3, H, W]."""
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    with_pil, with_torchvision = CLIPImageProcessorPil(**sizes), CLIPImageProcessor(**sizes)

    def opened(file: Path) -> Image.Image:
        image = Image.open(file).convert("RGB")
        return expanded_to_square(image) if aspect == "pad" else image

    return {
        "ours": ImageTransform(IMAGE_SIZE, MEAN, STD, aspect, "bicubic"),
        OFFICIAL: lambda file: official_reference(opened(file)),
        "transformers_pil": lambda file: with_pil(opened(file), return_tensors="pt")["pixel_values"][0],
        "transformers_torchvision": lambda file: with_torchvision(opened(file), return_tensors="pt")["pixel_values"][0],
    }


def expanded_to_square(image: Image.Image) -> Image.Image:
    """LLaVA's padding with the mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def official_reference(image: Image.Image) -> torch.Tensor:
    """The array work of CLIPImageProcessor in transformers 4.37, which the official code runs on.

    PIL resizes, between a conversion from an array and one back; the crop, 1/255 and the normalisation are numpy's, on
    channels last. Without that release's own overhead: it looks up Pillow's version several times a picture.
    """
    pixels = np.array(image.convert("RGB"))
    height, width = pixels.shape[:2]
    short = min(height, width)
    rows, columns = int(IMAGE_SIZE * height / short), int(IMAGE_SIZE * width / short)
    resized = Image.fromarray(pixels.astype(np.uint8)).resize((columns, rows), Image.Resampling.BICUBIC)
    top, left = (rows - IMAGE_SIZE) // 2, (columns - IMAGE_SIZE) // 2
    cropped = np.array(resized)[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    scaled = (cropped * (1 / 255)).astype(np.float32)
    normalised = (scaled - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    return torch.tensor(np.array([normalised.transpose(2, 0, 1)]))[0]


def cpu_seconds(way: PathToPixels, files: Sequence[Path]) -> float:
    """CPU seconds of this process to get the pixels of every file."""
    begin = time.process_time()
    for file in files:
        way(file)
    return time.process_time() - begin


def largest_difference(ours: PathToPixels, theirs: PathToPixels, files: Sequence[Path]) -> float:
    """Before normalisation, of 255."""
    std = torch.tensor(STD)[:, None, None]
    return round(max(float(((ours(file) - theirs(file)) * std * 255).abs().max()) for file in files), 3)


def write_pictures(folder: Path, num_pictures: int, quality: int) -> list[Path]:
    """Random pictures with a photograph's falling spectrum, a little colour and a sensor's noise.

    At quality 90 they take 0.29 bytes a pixel; the photograph that matplotlib ships takes 0.28.
    """
    rng = np.random.default_rng(0)
    files = [folder / f"{number}.jpg" for number in range(num_pictures)]
    for file in files:
        light, blue, red = (smooth_noise(rng) * spread for spread in (55, 12, 12))
        rgb = np.stack([light + 1.4 * red, light - 0.34 * blue - 0.71 * red, light + 1.77 * blue], axis=-1) + 118
        rgb += rng.normal(scale=2, size=(*light.shape, 1))
        Image.fromarray(rgb.clip(0, 255).round().astype(np.uint8)).save(file, quality=quality)
    return files


def smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """[H, W] with deviation 1, amplitudes falling as frequency ** -1.5."""
    width, height = PICTURE_SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency**1.5, s=(height, width))
    return noise / noise.std()


if __name__ == "__main__":
    main()
