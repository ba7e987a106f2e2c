"""The projection from vision features to the word embedding space."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def build_projector(kind: str, vision_width: int, llm_width: int, seed: int) -> nn.Module:
    """A projector [..., C] -> [..., D] with a seeded initialisation.

    ``linear`` is the paper's W (with a bias, as the released code has); ``mlp2x_gelu`` is LLaVA-1.5's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(vision_width, llm_width)
        return nn.Sequential(nn.Linear(vision_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


def split_projector(projector: nn.Module) -> tuple[list[nn.Module], Any]:
    """The layers before the last one, and the last one, which is part of the splice (an ``nn.Linear``)."""
    layers = [*projector] if isinstance(projector, nn.Sequential) else [projector]
    return layers[:-1], layers[-1]
