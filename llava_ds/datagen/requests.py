"""What a model is asked for each planned sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_ds.api.messages import ChatRequest
from llava_ds.datagen.grammar import reply_grammar
from llava_ds.datagen.plan import PAPER_MIX, PlannedSample
from llava_ds.datagen.prompt_files import Prompt
from llava_ds.datagen.symbolic import describe_image


@dataclass(frozen=True)
class GenerationSettings:
    """What the samples are a function of, beside images, prompts and the model's luck.

    ``num_samples`` None: as many as the mix allows. ``max_tokens`` None: as the kind says. ``reply_grammar`` sends a
    grammar of the reply's form, for llama.cpp servers. ``extra_body`` goes into each request.
    """

    model: str
    mix: Mapping[str, int] = field(default_factory=lambda: PAPER_MIX)
    num_samples: int | None = None
    seed: int = 0
    temperature: float = 0.7
    max_tokens: int | None = None
    max_attempts: int = 3
    reply_grammar: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class Requests:
    """The request of each sample, made when it is taken: its text is not held for all of them."""

    def __init__(
        self, samples: Sequence[PlannedSample], prompts: Mapping[str, Prompt], settings: GenerationSettings
    ) -> None:
        self._samples, self._prompts, self._settings = samples, prompts, settings

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[ChatRequest]:
        return (build_request(s, self._prompts[s.kind.name], self._settings) for s in self._samples)


def build_request(sample: PlannedSample, prompt: Prompt, settings: GenerationSettings) -> ChatRequest:
    """One request. Its seed goes by the sample id, so that images with the same captions get texts of their own."""
    grammar = {"grammar": reply_grammar(sample.kind)} if settings.reply_grammar else {}
    digest = hashlib.sha256(f"{settings.seed}|{sample.id}".encode()).digest()
    return ChatRequest(
        id=sample.id,
        model=settings.model,
        messages=prompt.ask(describe_image(sample.image, sample.kind)),
        max_tokens=settings.max_tokens or sample.kind.max_tokens,
        temperature=settings.temperature,
        seed=int.from_bytes(digest[:3], "big"),
        extra_body={**grammar, **settings.extra_body},
    )
