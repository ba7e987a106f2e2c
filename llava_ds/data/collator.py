"""From examples to a Batch, packed (no padding) or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llava_ds.constants import IGNORE_INDEX
from llava_ds.data.dataset import Example
from llava_ds.ops.row_plan import plan_rows
from llava_ds.schema import Batch


@dataclass(frozen=True)
class Collator:
    """Makes a Batch of examples.

    ``dummy_image`` [3, H, W] or [P, C] stands in when no example has an image. ``pad_id`` fills padding; the
    attention mask comes from lengths, never from comparing ids with it, so real tokens of that id survive.
    """

    packing: str
    dummy_image: torch.Tensor
    features: bool
    pad_id: int = 0

    def __call__(self, examples: Sequence[Example]) -> Batch:
        rows = self._packed_rows(examples) if self.packing == "packed" else self._padded_rows(examples)
        input_ids, labels, position_ids, attention_mask = rows
        loss_rows, loss_labels = plan_loss(labels)
        lengths = [len(example.encoded.input_ids) for example in examples] or [1]
        images = _stack([image for example in examples for image in example.images] or [self.dummy_image])
        packed = attention_mask is None
        return Batch(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int() if packed else None,
            max_seqlen=max(lengths),
            row_plan=plan_rows(input_ids, attention_mask),
            pixel_values=None if self.features else images,
            patch_features=images if self.features else None,
            loss_rows=loss_rows,
            loss_labels=loss_labels,
            num_supervised=int((loss_labels != IGNORE_INDEX).sum()),
            sample_ids=tuple(example.encoded.id for example in examples),
            problems=tuple(example.problem for example in examples if example.problem),
        )

    def _packed_rows(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Every sample after the other in one row: [1, T]."""
        ids = [token for example in examples for token in example.encoded.input_ids] or [self.pad_id]
        # The first token of a sample is predicted by nothing: its label must not reach the sample before it.
        labels = [
            label
            for example in examples
            for label in (IGNORE_INDEX, *example.encoded.labels[1:])
        ] or [IGNORE_INDEX]
        positions = [p for example in examples for p in range(len(example.encoded.input_ids))] or [0]
        return _row(ids), _row(labels), _row(positions), None

    def _padded_rows(
        self, examples: Sequence[Example]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One sample a row, padded on the right: [B, S]."""
        shape = max(len(examples), 1), max((len(example.encoded.input_ids) for example in examples), default=1)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[:, 0] = True
        for row, example in enumerate(examples):
            length = len(example.encoded.input_ids)
            ids[row, :length] = _row(example.encoded.input_ids)[0]
            labels[row, 1:length] = _row(example.encoded.labels[1:])[0]
            mask[row, :length] = True
        positions = torch.arange(shape[1]).expand(shape).clone()
        return ids, labels, positions, mask


def _row(values: Sequence[int]) -> torch.Tensor:
    """[1, T]; through numpy, as torch takes three times as long to read a list."""
    return torch.from_numpy(np.array([values], dtype=np.int64))


def _stack(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """[I, ...] in the memory layout of the images: pictures have their channels last."""
    if images[0].ndim != 3:
        return torch.stack(list(images))
    return torch.stack([image.movedim(0, -1) for image in images]).movedim(-1, 1)


def plan_loss(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S] labels -> rows [K] of the flattened [B * S] sequence that predict a supervised token, and that token [K].

    At least one row (with the label ``IGNORE_INDEX``), so that the LM head runs on every rank.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]  # column s predicts the token at s + 1
    rows = (targets != IGNORE_INDEX).flatten().nonzero().flatten()
    if len(rows) == 0:
        rows = torch.zeros(1, dtype=torch.long)
    return rows, targets.flatten()[rows]
