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
        ValueError: the mask has another shape, or a row within it holds another negative id.
    """
    ids = input_ids.cpu().flatten().numpy()
    src = np.where(ids == IMAGE_TOKEN_INDEX, IMAGE_ROW, ids)
    stray = (ids < 0) & (ids != IMAGE_TOKEN_INDEX)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"ids of shape {list(input_ids.shape)}, a mask of {list(attention_mask.shape)}")
        padding = ~attention_mask.cpu().flatten().numpy().astype(bool)
        src[padding] = PAD_ROW
        stray &= ~padding
    if stray.any():
        row = int(stray.argmax())
        raise ValueError(f"id {ids[row]} at row {row} is neither a token nor {IMAGE_TOKEN_INDEX} for a patch")
    rows = np.argsort(src, kind="stable")
    rows = rows[np.searchsorted(src[rows], 0) :]  # those of tokens
    token_ids, starts = np.unique(src[rows], return_index=True)
    plan = (src, np.flatnonzero(src == IMAGE_ROW), token_ids, np.append(starts, len(rows)), rows)
    return RowPlan(*(torch.from_numpy(part.astype(np.int64, copy=False)) for part in plan))
