"""Where the rows of a sequence come from, known on the CPU before the step.

Nothing on the device searches for image tokens or sorts token ids, so nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from llava_ds.constants import IMAGE_ROW, IMAGE_TOKEN_INDEX, PAD_ROW
from llava_ds.schema import RowPlan


class Needs(NamedTuple):
    """Which gradients a backward pass computes."""

    features: bool
    weight: bool
    bias: bool
    table: bool


def plan_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> RowPlan:
    """The plan of [B, S] ids with ``IMAGE_TOKEN_INDEX`` at patch positions; rows outside the mask are padding.

    Raises:
        ValueError: the mask has another shape, a row within it holds another negative id, or one outside it an image.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = f"ids {list(input_ids.shape)} but mask {list(attention_mask.shape)}"
        raise ValueError(f"{shapes}; give a mask with one entry for each id")
    ids = input_ids.cpu().flatten().numpy()
    within = np.ones(len(ids), bool) if attention_mask is None else attention_mask.cpu().flatten().numpy().astype(bool)
    is_image = ids == IMAGE_TOKEN_INDEX
    for wrong, what in (
        (within & (ids < 0) & ~is_image, f"neither a token nor {IMAGE_TOKEN_INDEX} for a patch"),
        (is_image & ~within, "a patch outside the mask, which would give its place to the next image"),
    ):
        if wrong.any():
            row, column = divmod(int(wrong.argmax()), input_ids.shape[-1])
            raise ValueError(f"id {input_ids[row, column]} in row {row}, column {column} is {what}")
    src = np.where(is_image, IMAGE_ROW, np.where(within, ids, PAD_ROW))
    rows = np.argsort(src, kind="stable")
    rows = rows[np.searchsorted(src[rows], 0) :]  # those of tokens
    token_ids, starts = np.unique(src[rows], return_index=True)
    plan = (src, np.flatnonzero(src == IMAGE_ROW), token_ids, np.append(starts, len(rows)), rows)
    return RowPlan(*(torch.from_numpy(part.astype(np.int64, copy=False)) for part in plan))
