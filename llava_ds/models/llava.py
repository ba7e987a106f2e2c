"""The LLaVA model: a frozen vision tower, a projector, and any transformers causal LM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llava_ds.constants import IGNORE_INDEX
from llava_ds.models.projector import split_projector
from llava_ds.models.splice import Splice
from llava_ds.models.vision_tower import VisionTower
from llava_ds.schema import Batch, RowPlan


class Llava(nn.Module):
    """Answers about images: patch features are projected and take the image's place among the word embeddings.

    ``zero_features`` replaces the patch features by zeros, for blind runs. ``fused`` lets the CUDA kernel do the
    splice (see ``resolve_splice``).
    """

    def __init__(
        self,
        vision_tower: VisionTower,
        projector: nn.Module,
        llm: Any,
        zero_features: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.llm = llm
        self.splice = Splice(self, fused)
        self.zero_features = zero_features

    def patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[I, 3, H, W] -> [I, P, C]."""
        features = self.vision_tower(pixel_values)
        return torch.zeros_like(features) if self.zero_features else features

    def inputs_embeds(
        self, input_ids: torch.Tensor, patch_features: torch.Tensor, row_plan: RowPlan
    ) -> torch.Tensor:
        """[B, S] ids and [I, P, C] features -> [B, S, D], images in their places (``plan_rows`` makes the plan).

        With a plan without image rows the features are a dummy's: the projector runs, and its gradient is zero.
        """
        features = torch.zeros_like(patch_features) if self.zero_features else patch_features
        # Not of a layer's weight: ZeRO-3 would keep one that is read here whole until the step ends.
        features = features.to(next(self.projector.parameters()).dtype)
        for layer in split_projector(self.projector)[0]:
            features = layer(features)
        return self.splice(features, input_ids, row_plan)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[K, V] logits at the batch's ``loss_rows``; the LM head runs nowhere else."""
        features = batch.patch_features
        if features is None:
            if batch.pixel_values is None:
                raise ValueError("a batch needs pixel_values or patch_features, a dummy image at least; got neither")
            features = self.patch_features(batch.pixel_values)
        embeds = self.inputs_embeds(batch.input_ids, features, batch.row_plan)
        with _head_on_rows(self.llm, batch.loss_rows):
            return self.llm(
                inputs_embeds=embeds,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **self._packed_attention(batch),
            ).logits[0]

    def forward(self, batch: Batch, per_token: bool = False) -> torch.Tensor:
        """Sum of the cross entropy over the batch's supervised tokens, in fp32 (a scalar).

        With ``per_token``, [2, K] in fp32: the cross entropy at every row of ``loss_rows``, and 1 where its token is
        the likeliest one (both 0 where nothing is supervised).
        """
        logits, labels = self.logits(batch).float(), batch.loss_labels
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none" if per_token else "sum")
        return torch.stack((losses, (logits.argmax(dim=-1) == labels).float())) if per_token else losses

    def _packed_attention(self, batch: Batch) -> dict[str, Any]:
        # Flash attention takes the sample boundaries; sdpa and eager read them from position_ids.
        if batch.cu_seqlens is None or self.llm.config._attn_implementation != "flash_attention_2":
            return {}
        return {
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_seqlen,
            "max_length_k": batch.max_seqlen,
        }


@contextmanager
def _head_on_rows(llm: Any, rows: torch.Tensor) -> Iterator[None]:
    """Lets the LM head see only some rows of the flattened [B * S] hidden states, as [1, K, D].

    transformers' ``logits_to_keep`` takes the same columns of every row, which in a padded batch are three times as
    many. What a model does to its logits after the head (scaling, soft caps) still happens.
    """

    def keep_rows(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        return (hidden.flatten(0, 1)[rows][None], *rest)

    handle = llm.get_output_embeddings().register_forward_pre_hook(keep_rows)
    try:
        yield
    finally:
        handle.remove()
