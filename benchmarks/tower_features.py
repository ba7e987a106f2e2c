"""How well patch features tell the quickstart's things apart: nearest neighbour, the unseen style to the trained ones.

Peer: the raw pixels at the same size. One figure for each block of the tower (as ``model.select_layer`` counts them)
and size: the share of the unseen style's pictures whose nearest neighbour has the same name.
"""

import json
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
import torch.nn.functional as F

from llava_ds.cache import cache_folder
from llava_ds.data.images import ImageTransform
from llava_ds.models.vision_tower import VisionTower, build_tower
from llava_ds.quickstart.concepts import load_concepts
from llava_ds.quickstart.sources import open_styles
from llava_ds.quickstart.tower import write_tower

SELECT_LAYERS = (-1, -2, -3, -4, -5)


@torch.no_grad()
def features(tower: VisionTower, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
    """[I, 3, H, W] -> [I, P, C] of each block in ``SELECT_LAYERS``."""
    indices = [tower.spec.layers + layer for layer in SELECT_LAYERS]
    parts = [
        tower.visual.forward_intermediates(chunk, indices=indices, intermediates_only=True, output_fmt="NLC")
        for chunk in pixel_values.split(64)
    ]
    stacks = zip(*(part["image_intermediates"] for part in parts), strict=True)
    return {layer: torch.cat(stack) for layer, stack in zip(sorted(SELECT_LAYERS), stacks, strict=True)}


def share_named(trained: torch.Tensor, unseen: torch.Tensor, names: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of ``unseen`` [I, ...] whose nearest in ``trained`` has its name; channels are standardised before."""
    dims = tuple(range(trained.dim() - 1))
    mean, std = trained.mean(dims), trained.std(dims) + 1e-6
    known, asked = (F.normalize(((x - mean) / std).flatten(1), dim=1) for x in (trained, unseen))
    return float((names[(asked @ known.T).argmax(1)] == truth).float().mean())


def measure(size: int) -> dict[str, float]:
    """The figures at one picture size."""
    (cache_folder() / "downloads").mkdir(parents=True, exist_ok=True)
    styles, concepts = open_styles(cache_folder() / "downloads", size), load_concepts()
    with TemporaryDirectory() as folder:
        write_tower(Path(folder) / "tower", size)
        tower = build_tower(str(Path(folder) / "tower"), None, -2)
    transform = ImageTransform.for_tower(tower.spec, "square")
    pixels: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    numbers: dict[bool, list[int]] = {True: [], False: []}
    for style in styles.available.values():
        for number, concept in enumerate(concepts):
            picture = style.draw(concept)
            if picture is not None:
                pixels[style.name == styles.unseen].append(transform.from_image(picture))
                numbers[style.name == styles.unseen].append(number)
    unseen, trained = torch.stack(pixels[True]), torch.stack(pixels[False])
    truth, names = torch.tensor(numbers[True]), torch.tensor(numbers[False])
    against = f"{len(trained)} of {', '.join(styles.trained)}"
    print(f"measured at {size} px: {len(unseen)} pictures of {styles.unseen} against {against}")
    figures = {
        f"raw_pixels_{size}px": share_named(trained.permute(0, 2, 3, 1), unseen.permute(0, 2, 3, 1), names, truth)
    }
    of_trained, of_unseen = features(tower, trained), features(tower, unseen)
    for layer in SELECT_LAYERS:
        figures[f"select_layer{layer}_{size}px"] = share_named(of_trained[layer], of_unseen[layer], names, truth)
    return figures


@click.command()
@click.option("--quick", is_flag=True, help="84 px only.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Writes the figures there.")
def main(quick: bool, json_file: Path | None) -> None:
    """Prints one line a figure."""
    print(f"on: {platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    figures: dict[str, float] = {}
    for size in (84,) if quick else (56, 84, 112):
        figures |= measure(size)
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
