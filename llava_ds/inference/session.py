"""A model that answers: from a run, a checkpoint step or a merged folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from llava_ds.checkpoint.load import load_model
from llava_ds.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava_ds.data.images import ImageTransform
from llava_ds.errors import DataError
from llava_ds.models.llava import Llava
from llava_ds.schema import Turn
from llava_ds.text.encode import encode_prompt, stop_string
from llava_ds.text.templates import Template, get_template


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Session:
    """Model, tokenizer, template and image transform of one checkpoint, on one device."""

    model: Llava
    tokenizer: Any
    template: Template
    transform: ImageTransform
    device: torch.device

    def stream(self, turns: Sequence[Turn], images: Sequence[Path], sampling: Sampling) -> Iterator[str]:
        """Pieces of the answer to a conversation that ends in a user turn, as they come.

        Raises DataError when the placeholders do not match the images, or an image does not decode.
        """
        inputs = self._inputs([turns], [images])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=False, skip_special_tokens=True)
        options = self._options(sampling)
        worker = Thread(target=lambda: self.model.llm.generate(**inputs, **options, streamer=streamer), daemon=True)
        worker.start()
        yield from streamer
        worker.join()

    @torch.no_grad()
    def answer_batch(
        self, conversations: Sequence[Sequence[Turn]], images: Sequence[Sequence[Path]], sampling: Sampling
    ) -> list[str]:
        """One answer for each conversation; prompts are padded on the left."""
        outputs = self.model.llm.generate(**self._inputs(conversations, images), **self._options(sampling))
        stop = stop_string(self.template)
        answers = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return [answer.split(stop)[0].strip() if stop else answer.strip() for answer in answers]

    def _inputs(self, conversations: Sequence[Sequence[Turn]], images: Sequence[Sequence[Path]]) -> dict[str, Any]:
        for turns, paths in zip(conversations, images, strict=True):
            num_placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
            if num_placeholders != len(paths):
                raise DataError(f"{num_placeholders} '{IMAGE_PLACEHOLDER}' in the conversation but {len(paths)} images")
        num_patches = self.model.vision_tower.spec.num_patches
        rows = [encode_prompt(turns, self.tokenizer, self.template, num_patches) for turns in conversations]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        pixels = [self.transform(path) for paths in images for path in paths]
        size = self.transform.image_size
        stacked = torch.stack(pixels) if pixels else torch.zeros(1, 3, size, size)
        with torch.no_grad():
            features = self.model.patch_features(stacked.to(self.device))
            image_rows = (ids.flatten() == IMAGE_TOKEN_INDEX).nonzero().flatten()
            embeds = self.model.inputs_embeds(ids, features, image_rows)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        stop = stop_string(self.template)
        eos = self.tokenizer.eos_token_id
        options: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "eos_token_id": eos,
            "pad_token_id": eos,
        }
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if stop:
            options |= {"stop_strings": [stop], "tokenizer": self.tokenizer}
        return options


def load_session(path: Path) -> Session:
    """A session over a run folder, a checkpoint step or a merged folder. Raises CheckpointError when it is none."""
    loaded = load_model(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = ImageTransform.for_tower(loaded.model.vision_tower.spec, loaded.image_aspect_ratio)
    return Session(
        loaded.model.to(device), loaded.tokenizer, get_template(loaded.template), transform, device
    )
