"""The nouns of the path from a record to a batch.

Shapes use one alphabet everywhere: ``B`` rows, ``S`` padded length, ``T`` packed tokens, ``I`` images,
``P`` patches per image, ``C`` vision width, ``D`` LLM width, ``V`` vocabulary, ``K`` supervised rows; of a batch's
flattened [B * S] sequence, ``R`` all rows, ``M`` those of patches, ``U`` the distinct tokens of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from llava_ds.constants import IGNORE_INDEX

Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message. A user's text may hold ``<image>`` placeholders, one for each image of the sample."""

    role: Role
    text: str


@dataclass(frozen=True)
class StoredImage:
    """A picture that is not a file of its own: ``read`` gives its encoded bytes (JPEG, PNG, ...)."""

    name: str
    read: Callable[[], bytes]


Image = str | StoredImage
"""A path, or a picture inside an archive or a table."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    ``images`` are in the order of the placeholders; ``origin`` says where the record stands
    (``train.json[17]``), for error messages.
    """

    id: str
    images: tuple[Image, ...]
    turns: tuple[Turn, ...]
    origin: str

    def where(self) -> str:
        """The place of this sample in an error message."""
        return f"{self.origin} id={self.id!r}"


@dataclass(frozen=True)
class EncodedSample:
    """A sample as ids and labels of equal length, both from one call.

    Each image stands as ``P`` consecutive ``IMAGE_TOKEN_INDEX`` entries, in the order of ``images``.
    """

    id: str
    images: tuple[Image, ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    num_cut_turns: int = 0
    """Turns at the end of the record that did not fit (``data.truncation``)."""
    num_cut_tokens: int = 0
    """Tokens that these turns would have taken, or that were cut off within a turn."""

    @property
    def num_supervised(self) -> int:
        """Number of positions that the loss reads."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True)
class RowPlan:
    """Where each of the R rows of a flattened [B * S] sequence comes from; every tensor is int64.

    ``src``          [R] a token id, ``PAD_ROW`` (a row of zeros) or ``IMAGE_ROW`` (a patch).
    ``image_rows``   [M] the row that each patch fills, in the order of the patches; no row twice.
    ``token_ids``    [U] the distinct token ids of ``src``, ascending.
    ``token_starts`` [U + 1] and ``token_rows`` [R - M - pads]: the rows of ``token_ids[u]`` are
                     ``token_rows[token_starts[u]:token_starts[u + 1]]``, ascending.
    """

    src: torch.Tensor
    image_rows: torch.Tensor
    token_ids: torch.Tensor
    token_starts: torch.Tensor
    token_rows: torch.Tensor

    def pin_memory(self) -> RowPlan:
        """The same plan in page-locked memory."""
        return RowPlan(*(tensor.pin_memory() for tensor in vars(self).values()))

    def to(self, device: torch.device, non_blocking: bool = False) -> RowPlan:
        """The same plan on ``device``."""
        return RowPlan(*(tensor.to(device, non_blocking=non_blocking) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU or moved by ``to``.

    ``input_ids``      [B, S] with ``IMAGE_TOKEN_INDEX`` at patch positions; B = 1 and S = T when packed.
    ``position_ids``   [B, S], starting at 0 in every sample.
    ``attention_mask`` [B, S] bool when padded, None when packed.
    ``cu_seqlens``     [num_samples + 1] int32 when packed, None when padded.
    ``row_plan``       where the rows of the flattened [B * S] sequence come from: token, patch or padding.
    ``pixel_values``   [I, 3, H, W] of the images, uint8 levels that the tower normalises (or normalised floats);
                       None when ``patch_features`` is given.
    ``patch_features`` [I, P, C] from the feature cache, or None.
    ``loss_rows``      [K] rows of the flattened [B * S] sequence that predict a supervised token.
    ``loss_labels``    [K] the token to predict there.
    ``problems``       one message for each sample whose picture was bad; none of its tokens is supervised.
    A batch without an image carries one dummy image, which fills no row: the tower and the projector run
    on every rank in every micro-batch, or ZeRO-3 would hang.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    row_plan: RowPlan
    pixel_values: torch.Tensor | None
    patch_features: torch.Tensor | None
    loss_rows: torch.Tensor
    loss_labels: torch.Tensor
    num_supervised: int
    sample_ids: tuple[str, ...]
    problems: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions that hold a token of a sample; a batch without samples has none."""
        if not self.sample_ids:
            return 0
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader asks for it."""
        return replace(self, **{name: value.pin_memory() for name, value in self._movable().items()})

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on ``device``."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self._movable().items()})

    def _movable(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor | RowPlan)}
