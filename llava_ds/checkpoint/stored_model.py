"""A whole LLaVA on disk: what every layout is read into and written from. Its weights are read when asked for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.models.vision_tower import TowerSpec

_TOKENIZER_MODEL = "tokenizer.model"


@dataclass(frozen=True)
class StoredModel:
    """A model without its weights in memory.

    ``weights`` have our names: ``vision_tower.visual.*`` (open_clip's), ``projector.*``, ``llm.*`` (those of
    transformers' causal LM; ``llm.lm_head.weight`` is absent where it is tied). ``text_config`` is the LLM's
    transformers config as plain data; its ``vocab_size`` is the LLM's own, without words that an export added.
    """

    weights: Mapping[str, LazyTensor]
    text_config: dict[str, Any]
    tower: TowerSpec
    select_layer: int
    projector: str
    tokenizer: Any
    template: str
    image_aspect_ratio: str
    zero_features: bool
    dtype: torch.dtype
    """What the weights are written in."""
    tower_name: str | None = None
    """What transformers' hub calls the tower, where it is one that is published there, unchanged."""
    projector_act: str = "auto"
    """How a linear projector is written in layouts with two layers, see ``choose_projector_export``."""
    tokenizer_model: Path | None = None
    """The SentencePiece file that the tokenizer was made of, where there is one."""


def find_tokenizer_model(folder: Path) -> Path | None:
    """The SentencePiece file of a folder, where it has one."""
    return folder / _TOKENIZER_MODEL if (folder / _TOKENIZER_MODEL).is_file() else None


def copy_tokenizer_model(model: StoredModel, folder: Path) -> None:
    """Keeps the SentencePiece file beside what else an export writes; the original code's tokenizer is made of it."""
    if model.tokenizer_model:
        shutil.copyfile(model.tokenizer_model, folder / _TOKENIZER_MODEL)
