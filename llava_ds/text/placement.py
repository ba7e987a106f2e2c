"""Where the images of the first user turn stand: before or after the question (paper, equation 4)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.schema import Sample


def apply_placement(sample: Sample, mode: str, seed: int, epoch: int) -> Sample:
    """The sample with the images of its first turn placed; later turns stay as they are.

    ``as_data`` changes nothing. ``front`` puts them before the question. ``random`` takes either order with
    equal chance, as a pure function of (seed, epoch, sample id): no worker count and no resume changes it.
    """
    first = sample.turns[0]
    num_images = first.text.count(IMAGE_PLACEHOLDER)
    if mode == "as_data" or num_images == 0:
        return sample
    question = first.text.replace(IMAGE_PLACEHOLDER, "").strip()
    images = "\n".join([IMAGE_PLACEHOLDER] * num_images)
    in_front = mode == "front" or is_image_first(seed, epoch, sample.id)
    ordered = (images, question) if in_front else (question, images)
    text = "\n".join(part for part in ordered if part)
    return replace(sample, turns=(replace(first, text=text), *sample.turns[1:]))


def place_images(question: str, num_images: int) -> str:
    """A question with its images in front of it, unless it places them itself with ``<image>``."""
    if IMAGE_PLACEHOLDER in question:
        return question
    return f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def is_image_first(seed: int, epoch: int, sample_id: str) -> bool:
    """The coin of ``random`` placement."""
    return hashlib.sha256(f"{seed}|{epoch}|{sample_id}".encode()).digest()[0] % 2 == 0
