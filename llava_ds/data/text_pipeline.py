"""From a sample to ids and labels: placement, then encoding within the limit. The same call plans and trains."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import llava_ds
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.schema import EncodedSample, Sample, Turn
from llava_ds.text.chat_template import resolve_template
from llava_ds.text.encode import encode_turns
from llava_ds.text.placement import apply_placement, place_first_images
from llava_ds.text.templates import AnyTemplate
from llava_ds.text.truncation import encode_within


@dataclass(frozen=True)
class TextPipeline:
    """The settings that make ids of samples.

    ``template`` is a name, see ``resolve_template``; ``num_patches`` are the positions of an image.
    """

    tokenizer: Any
    template: str
    placement: str
    num_patches: int
    max_length: int
    seed: int
    truncation: str = "drop_last_turns"

    @cached_property
    def _template(self) -> AnyTemplate:
        return resolve_template(self.template, self.tokenizer)

    def resolve(self) -> None:
        """Raises ConfigError when the template is unknown, or does not go with the tokenizer."""
        encode_turns((Turn("user", "a"), Turn("assistant", "b")), self.tokenizer, self._template, 1)

    def encode(self, sample: Sample, epoch: int) -> EncodedSample:
        """Ids and labels of a sample in an epoch (random placement depends on it). Raises DataError for a bad one."""
        return self._encode(apply_placement(sample, self.placement, self.seed, epoch))

    def encode_orders(self, sample: Sample) -> tuple[EncodedSample, EncodedSample]:
        """The sample as it is when the image comes first, and when it comes last; equal where there is no choice.

        Raises DataError when either is bad: a sample is good in every epoch or in none.
        """
        if self.placement != "random":
            encoded = self.encode(sample, 0)
            return encoded, encoded
        first = self._encode(place_first_images(sample, image_first=True))
        if self._template.drops_question or not _has_images_in_first_question(sample):
            return first, first
        return first, self._encode(place_first_images(sample, image_first=False))

    def fingerprint(self) -> str:
        """Changes whenever lengths may: settings, tokenizer, template, or the code that encodes."""
        digest = hashlib.sha256()
        settings = (self.placement, self.num_patches, self.max_length, self.truncation, self.template)
        digest.update(repr((settings, self.tokenizer.chat_template, self.tokenizer.special_tokens_map)).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        package = Path(llava_ds.__file__).parent
        for file in sorted([*package.glob("text/*.py"), *package.glob("data/**/*.py"), *package.glob("*.py")]):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def _encode(self, placed: Sample) -> EncodedSample:
        return encode_within(
            placed, self.tokenizer, self._template, self.num_patches, self.max_length, self.truncation
        )


def _has_images_in_first_question(sample: Sample) -> bool:
    first = next((turn.text for turn in sample.turns if turn.role == "user"), "")
    return IMAGE_PLACEHOLDER in first
