"""Samples by number: placed, encoded, and with their images or cached features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from llava_ds.data.images import check_image_header
from llava_ds.errors import DataError
from llava_ds.schema import EncodedSample, Sample
from llava_ds.text.encode import encode_sample
from llava_ds.text.placement import apply_placement, is_image_first
from llava_ds.text.templates import get_template


@dataclass(frozen=True)
class Example:
    """What a worker hands to the collator: the text and the images [I, 3, H, W] or features [I, P, C]."""

    encoded: EncodedSample
    images: torch.Tensor | None


@dataclass(frozen=True)
class TextPipeline:
    """From a sample to ids and labels; the same call for planning and for training."""

    tokenizer: Any
    template: str
    placement: str
    num_patches: int
    max_length: int
    seed: int

    def encode(self, sample: Sample, epoch: int) -> EncodedSample:
        """Ids and labels of a sample in an epoch (the placement may depend on it)."""
        placed = apply_placement(sample, self.placement, self.seed, epoch)
        return encode_sample(placed, self.tokenizer, get_template(self.template), self.num_patches, self.max_length)

    def measure(self, sample: Sample) -> EncodedSample:
        """Ids and labels as in the first epoch, once it is sure that no later epoch's placement is too long."""
        encoded = self.encode(sample, epoch=0)
        # The two orders differ by a few tokens, where the image meets the text.
        if self.placement == "random" and sample.images and len(encoded.input_ids) > self.max_length - 32:
            first = is_image_first(self.seed, 0, sample.id)
            self.encode(sample, next(e for e in count(1) if is_image_first(self.seed, e, sample.id) != first))
        return encoded


class LlavaDataset(torch.utils.data.Dataset[Example]):
    """Examples by ``Slot``; holds only the records, never decoded images."""

    def __init__(
        self,
        samples: Sequence[Sample],
        text: TextPipeline,
        image_root: Path,
        load_image: Callable[[Path], torch.Tensor],
    ) -> None:
        self.samples = samples
        self.text = text
        self.image_root = image_root
        self.load_image = load_image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, slot: Any) -> Example:
        sample = self.samples[slot.index]
        encoded = self.text.encode(sample, slot.epoch)
        images = [self.load_image(self.image_root / name) for name in encoded.images]
        return Example(encoded, torch.stack(images) if images else None)


@dataclass(frozen=True)
class EncodedLengths:
    """Per sample: tokens and supervised tokens, known before any image is decoded."""

    num_tokens: list[int]
    num_supervised: list[int]


def measure_samples(
    samples: Sequence[Sample], text: TextPipeline, on_bad_sample: str, skipped_before: Counter[str]
) -> tuple[list[Sample], EncodedLengths, Counter[str]]:
    """Encodes every sample once, so that a bad one is found before training and not in the middle of it.

    Returns the good samples, their lengths, and how many were skipped by reason, ``skipped_before`` included.

    Raises DataError for a bad sample unless ``on_bad_sample`` is ``skip``, and when none is left.
    """
    kept: list[Sample] = []
    lengths = EncodedLengths([], [])
    skipped = Counter(skipped_before)
    for sample in samples:
        try:
            encoded = text.measure(sample)
        except DataError as error:
            if on_bad_sample != "skip":
                raise
            skipped[error.reason] += 1
            continue
        kept.append(sample)
        lengths.num_tokens.append(len(encoded.input_ids))
        lengths.num_supervised.append(encoded.num_supervised)
    if not kept:
        raise DataError(f"no sample is left to train on; {sum(skipped.values())} were skipped: {dict(skipped)}")
    return kept, lengths, skipped


def check_images_exist(samples: Sequence[Sample], image_root: Path) -> None:
    """Raises DataError that lists the first missing images and counts them all."""
    missing = [
        f"{sample.where()}: {image_root / name}"
        for sample in samples
        for name in sample.images
        if not (image_root / name).is_file()
    ]
    if missing:
        raise DataError(
            f"{len(missing)} image file(s) are missing under data.image_root={str(image_root)!r}, the first:\n  "
            + "\n  ".join(missing[:5])
            + "\n  Fix the paths or data.image_root, or set data.on_bad_sample=skip."
        )


def drop_unreadable_images(samples: Sequence[Sample], image_root: Path) -> tuple[list[Sample], Counter[str]]:
    """The samples whose images all exist and begin as pictures do, and how many do not by reason.

    Only headers are read: a picture that is cut off further on is an error when it is decoded.
    """
    kept = []
    skipped: Counter[str] = Counter()
    for sample in samples:
        try:
            for name in sample.images:
                check_image_header(image_root / name)
            kept.append(sample)
        except DataError as error:
            skipped[error.reason] += 1
    return kept, skipped
