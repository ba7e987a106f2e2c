"""A model that answers: from a run, a checkpoint step or a merged folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from llava_ds.checkpoint.load import load_model
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.data.images import ImageTransform
from llava_ds.errors import DataError
from llava_ds.inference.row_sampling import RowSampling
from llava_ds.models.llava import Llava
from llava_ds.ops.row_plan import plan_rows
from llava_ds.schema import Turn
from llava_ds.text.chat_template import resolve_template
from llava_ds.text.encode import encode_prompt, stop_id, stop_string
from llava_ds.text.templates import AnyTemplate


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    """Of ``Session.answer_batch``; a chat is drawn anew every time."""


@dataclass(frozen=True)
class Session:
    """Model, tokenizer, template and image transform of one checkpoint, on one device."""

    model: Llava
    tokenizer: Any
    template: AnyTemplate
    transform: ImageTransform
    device: torch.device

    def stream(self, turns: Sequence[Turn], images: Sequence[Path], sampling: Sampling) -> Iterator[str]:
        """Pieces of the answer to a conversation that ends in a user turn, as they come.

        Raises DataError when the placeholders do not match the images, or an image does not decode; what goes
        wrong while the model generates is raised here, too.
        """
        inputs, options = self._inputs([turns], [images]), self._options(sampling)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=False, skip_special_tokens=True)
        failures: list[Exception] = []

        def generate() -> None:
            try:
                self.model.llm.generate(**inputs, **options, streamer=streamer)
            except Exception as error:
                failures.append(error)
            finally:
                streamer.on_finalized_text("", stream_end=True)  # after a failure, too, or the loop below would hang

        worker = Thread(target=generate, daemon=True)
        worker.start()
        yield from before_stop(streamer, stop_string(self.tokenizer, self.template))
        worker.join()
        if failures:
            raise failures[0]

    def prompt_length(self, turns: Sequence[Turn]) -> int:
        """Tokens of a conversation up to where the answer begins, patches of its images counted."""
        return len(encode_prompt(turns, self.tokenizer, self.template, self.model.vision_tower.spec.num_patches))

    @torch.no_grad()
    def answer_batch(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Sequence[Path]],
        sampling: Sampling,
        ids: Sequence[str] | None = None,
    ) -> list[str]:
        """One answer for each conversation; prompts are padded on the left.

        Where answers are drawn, each depends on ``sampling.seed`` and its conversation's id (by default its number),
        on no other conversation.

        Raises DataError when the placeholders do not match the images, or an image does not decode.
        """
        options = self._options(replace(sampling, temperature=0.0))
        if sampling.temperature > 0:
            ids = ids or [str(number) for number in range(len(conversations))]
            options["logits_processor"] = [RowSampling(ids, sampling.seed, sampling.temperature, sampling.top_p)]
        outputs = self.model.llm.generate(**self._inputs(conversations, images), **options)
        stop = stop_string(self.tokenizer, self.template)
        answers = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return [answer.split(stop)[0].strip() if stop else answer.strip() for answer in answers]

    def _inputs(self, conversations: Sequence[Sequence[Turn]], images: Sequence[Sequence[Path]]) -> dict[str, Any]:
        for turns, paths in zip(conversations, images, strict=True):
            num_placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
            if num_placeholders != len(paths):
                raise DataError(
                    f"{num_placeholders} '{IMAGE_PLACEHOLDER}' in the questions but {len(paths)} image(s) given.\n"
                    f"  Each '{IMAGE_PLACEHOLDER}' stands for one image: give as many, or take it out of the question."
                )
            if self.template.drops_question and not paths:
                raise DataError(
                    f"template {self.template.name!r} (stage 1) keeps only the images of a question, and none is given;"
                    " give an image, or use a checkpoint of stage 2"
                )
        num_patches = self.model.vision_tower.spec.num_patches
        rows = [encode_prompt(turns, self.tokenizer, self.template, num_patches) for turns in conversations]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        plan = plan_rows(ids, mask).to(self.device)
        pixels = [self.transform(path) for paths in images for path in paths]
        size = self.transform.image_size
        stacked = torch.stack(pixels) if pixels else torch.zeros(1, 3, size, size)
        with torch.no_grad():
            features = self.model.patch_features(stacked.to(self.device))
            embeds = self.model.inputs_embeds(ids.to(self.device), features, plan)
        return {"inputs_embeds": embeds, "attention_mask": mask.to(self.device)}

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        stop = stop_string(self.tokenizer, self.template)
        eos = stop_id(self.tokenizer, self.template)
        options: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "eos_token_id": eos,
            "pad_token_id": 0 if eos is None else eos,  # its positions are masked
        }
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if stop:
            options |= {"stop_strings": [stop], "tokenizer": self.tokenizer}
        return options


def before_stop(pieces: Iterable[str], stop: str | None) -> Iterator[str]:
    """Pieces of a text up to its stop string, which may begin in one piece and end in another."""
    if stop is None:
        yield from pieces
        return
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held.split(stop)[0]
            return
        begun = max(size for size in range(len(stop)) if held.endswith(stop[:size]))
        cut = len(held) - begun
        yield held[:cut]
        held = held[cut:]
    yield held


def load_session(path: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Session:
    """A session over a run folder, a checkpoint step or a merged folder, by default on a GPU where there is one.

    Raises CheckpointError when it is none of these.
    """
    loaded = load_model(path, dtype=dtype)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = ImageTransform.for_tower(loaded.model.vision_tower.spec, loaded.image_aspect_ratio)
    template = resolve_template(loaded.template, loaded.tokenizer)
    return Session(loaded.model.to(device), loaded.tokenizer, template, transform, device)
