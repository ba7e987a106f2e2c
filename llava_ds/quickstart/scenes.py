"""Scenes: several pictures on one canvas, each at a known place, so that boxes and answers are exact."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from llava_ds.quickstart.concepts import Concept
from llava_ds.quickstart.sources import Style

PLACES = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Thing:
    """One picture of a scene. ``box`` is (left, top, right, bottom) as fractions of the canvas."""

    concept: Concept
    place: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A canvas and what stands on it."""

    id: str
    style: str
    image: Image.Image
    things: tuple[Thing, ...]

    def captions(self) -> list[str]:
        """Two sentences about the scene, as a person would caption it."""
        names = [f"{thing.concept.name} in the {thing.place}" for thing in self.things]
        plural = "s" if len(names) > 1 else ""
        return [f"A picture of {', '.join(names)}.", f"{len(names)} small drawing{plural} on white."]


def compose_scenes(
    style: Style, concepts: Sequence[Concept], num_scenes: int, image_size: int, seed: int
) -> list[Scene]:
    """``num_scenes`` scenes of one to four things in one style, as a pure function of the arguments."""
    rng = random.Random(f"{seed}|{style.name}")
    drawable = [concept for concept in concepts if style.draw(concept) is not None]
    scenes = []
    for number in range(num_scenes):
        chosen = rng.sample(drawable, rng.randint(1, 4))
        places = sorted(rng.sample(range(4), len(chosen)))
        scenes.append(_compose(f"scene-{style.name}-{number:04d}", style, chosen, places, image_size))
    return scenes


def _compose(scene_id: str, style: Style, concepts: Sequence[Concept], places: Sequence[int], size: int) -> Scene:
    canvas = Image.new("RGB", (size, size), "white")
    cell, margin = size // 2, size // 56
    things = []
    for concept, place in zip(concepts, places, strict=True):
        picture = style.draw(concept)
        if picture is None:
            continue
        side = cell - 2 * margin
        left, top = (place % 2) * cell + margin, (place // 2) * cell + margin
        canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        box = tuple(round(edge / size, 3) for edge in (left, top, left + side, top + side))
        things.append(Thing(concept, PLACES[place], box))  # type: ignore[arg-type]
    return Scene(scene_id, style.name, canvas, tuple(things))
