"""Projection of patch features and their splice into the text embeddings.

The row plan comes from the collator, on the CPU, before the step: nothing here searches for image tokens,
so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import nn


def project_splice(
    patch_features: torch.Tensor,
    projector: nn.Module,
    text_embeds: torch.Tensor,
    image_rows: torch.Tensor,
) -> torch.Tensor:
    """Replaces rows of the text embeddings by projected patch features (paper, section 4.1: H_v = W Z_v).

    Args:
        patch_features: [I, P, C].
        projector: maps [..., C] to [..., D].
        text_embeds: [B, S, D]; what stands at image rows is ignored.
        image_rows: [R] rows of the flattened [B * S] sequence, R <= I * P. Patches from R on belong to a
            dummy image: they fill no row, yet keep the projector in the graph with a gradient of zero.

    Returns:
        [B, S, D] in the dtype of ``text_embeds``.

    Raises:
        ValueError: more rows than patches.
    """
    width = text_embeds.shape[-1]
    patches = projector(patch_features).reshape(-1, width).to(text_embeds.dtype)  # [I, P, C] -> [I * P, D]
    if len(image_rows) > len(patches):
        raise ValueError(f"{len(image_rows)} image rows in the plan but only {len(patches)} patches were given")
    flat = text_embeds.reshape(-1, width)
    spliced = flat.index_copy(0, image_rows, patches[: len(image_rows)])
    unused = patches[len(image_rows) :]
    if len(unused):
        spliced = spliced + unused.sum() * 0
    return spliced.view_as(text_embeds)
