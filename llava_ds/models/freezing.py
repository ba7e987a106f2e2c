"""Which parameters train: a stage is data, not a branch in the loop."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

PARTS = ("vision_tower", "projector", "llm")


def apply_freezing(model: nn.Module, trainable: Collection[str]) -> None:
    """Lets exactly the named parts of a Llava train (stage 1: projector; stage 2: projector and llm)."""
    for part in PARTS:
        getattr(model, part).requires_grad_(part in trainable)
