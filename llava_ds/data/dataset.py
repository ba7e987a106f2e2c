"""Samples by number: placed, encoded, and with their images or cached features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_ds.constants import IGNORE_INDEX
from llava_ds.data.sources.source import Source
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError
from llava_ds.schema import EncodedSample, Image


@dataclass(frozen=True)
class Example:
    """What a worker hands to the collator: the text and its images, [3, H, W] each, or features [P, C].

    ``problem`` says what was wrong with a picture (``on_bad_sample="skip"``); nothing of the text is supervised then.
    """

    encoded: EncodedSample
    images: Sequence[torch.Tensor] = ()
    problem: str | None = None


class LlavaDataset(torch.utils.data.Dataset[Example]):
    """Examples by ``Slot``; records are read when asked for, decoded images are not kept.

    A picture that is missing or does not decode is a DataError, or with ``skip_bad_images`` an example without
    supervised tokens and with ``blank`` ([3, H, W] or [P, C]) in the picture's place: lengths stay as planned.
    """

    def __init__(
        self,
        source: Source,
        text: TextPipeline,
        load_image: Callable[[Image], torch.Tensor],
        blank: torch.Tensor,
        skip_bad_images: bool = False,
    ) -> None:
        self.source = source
        self.text = text
        self.load_image = load_image
        self.blank = blank
        self.skip_bad_images = skip_bad_images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, slot: Any) -> Example:
        sample = self.source[slot.index]
        encoded = self.text.encode(sample, slot.epoch)
        try:
            return Example(encoded, [self.load_image(image) for image in encoded.images])
        except DataError as error:
            if not self.skip_bad_images:
                raise DataError(f"{sample.where()}: {error}", error.reason) from error
            unsupervised = replace(encoded, labels=(IGNORE_INDEX,) * len(encoded.labels))
            blanks = [self.blank] * len(encoded.images)
            return Example(unsupervised, blanks, f"{sample.where()}: {error}")
