"""Projection and splice on the CPU: every row is computed where it belongs, in one output.

A stretch of text is one gather and an image one GEMM, both straight into their rows of the output. Neither the
projected patches nor a copy of all their gradients exists beside it: temporaries have at most ``PIECE_ROWS`` rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llava_ds.constants import PAD_ROW
from llava_ds.ops.row_plan import Needs
from llava_ds.ops.splice_eager import sum_dtype
from llava_ds.schema import RowPlan

GEMM_ROWS = 256
"""Rows from which on a GEMM runs at full speed. Shorter runs are joined and copied: at 36 patches an image that takes
a quarter of the time off."""

PIECE_ROWS = 4 * GEMM_ROWS
"""Rows of a piece: in 16 bits a GEMM copies what is transposed for it, and a sum converts what it adds."""

Run = tuple[int, int]
"""Its first position and the one after its last."""

Piece = tuple[slice, slice | Tensor]
"""Consecutive patches and the rows that they fill: consecutive too, or one by one."""


def find_runs(values: np.ndarray, step: int) -> list[Run]:
    """The maximal stretches [begin, end) of [n] integers in which each is the one before it plus ``step``."""
    cuts = (np.flatnonzero(np.diff(values) != step) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(values)], strict=True)) if len(values) else []


def image_pieces(image_rows: Tensor) -> Iterator[Piece]:
    """All patches in order: runs in parts of ``PIECE_ROWS``; shorter ones joined up to ``GEMM_ROWS``."""
    rows = image_rows.numpy()
    parts = [
        (part, min(part + PIECE_ROWS, end))
        for begin, end in find_runs(rows, step=1)
        for part in range(begin, end, PIECE_ROWS)
    ]
    pieces: list[list[Run]] = []
    for begin, end in parts:
        if pieces and end - begin < GEMM_ROWS and pieces[-1][-1][1] - pieces[-1][0][0] < GEMM_ROWS:
            pieces[-1].append((begin, end))
        else:
            pieces.append([(begin, end)])
    for runs in pieces:
        begin, end = runs[0][0], runs[-1][1]
        first = int(rows[begin])
        yield slice(begin, end), slice(first, first + end - begin) if len(runs) == 1 else image_rows[begin:end]


@torch.no_grad()
def forward(patch_features: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, plan: RowPlan) -> Tensor:
    """Patches [I * P, C], weight [D, C], bias [D], table [V, D] -> [R, D]. See ``project_splice``."""
    if len(plan.token_ids) and plan.token_ids[-1] >= len(table):
        raise IndexError(f"token id {plan.token_ids[-1]} is beyond the table of {len(table)} rows; fix the tokenizer")
    out = table.new_empty(len(plan.src), table.shape[1])
    kinds = np.minimum(plan.src.numpy(), 0)  # 0 for every token
    for begin, end in find_runs(kinds, step=0):
        if kinds[begin] == 0:
            torch.index_select(table, 0, plan.src[begin:end], out=out[begin:end])
        elif kinds[begin] == PAD_ROW:
            out[begin:end].zero_()
    for patches, rows in image_pieces(plan.image_rows):
        if isinstance(rows, Tensor):
            out.index_copy_(0, rows, torch.nn.functional.linear(patch_features[patches], weight, bias))
        elif bias is None:
            torch.mm(patch_features[patches], weight.t(), out=out[rows])
        else:
            torch.addmm(bias, patch_features[patches], weight.t(), out=out[rows])
    return out


@torch.no_grad()
def backward(
    grad: Tensor, patch_features: Tensor, weight: Tensor, num_tokens: int, plan: RowPlan, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the patches, weight, bias and table from that of the output [R, D]; not needed ones are empty.

    Sums over rows are kept in float32 for 16-bit numbers, and always taken in the same order.
    """
    return (
        features_gradient(grad, patch_features, weight, plan) if needs.features else grad.new_empty(0),
        weight_gradient(grad, patch_features, weight, plan) if needs.weight else grad.new_empty(0),
        bias_gradient(grad, plan) if needs.bias else grad.new_empty(0),
        table_gradient(grad, num_tokens, plan) if needs.table else grad.new_empty(0),
    )


def features_gradient(grad: Tensor, patch_features: Tensor, weight: Tensor, plan: RowPlan) -> Tensor:
    """[I * P, C]; patches that fill no row get zero."""
    out = patch_features.new_empty(patch_features.shape)
    for patches, rows in image_pieces(plan.image_rows):
        torch.mm(grad[rows], weight, out=out[patches])
    out[len(plan.image_rows) :].zero_()
    return out


def weight_gradient(grad: Tensor, patch_features: Tensor, weight: Tensor, plan: RowPlan) -> Tensor:
    """[D, C].

    A 16-bit GEMM sums in float32 and rounds once a piece; pieces are added in float32. GEMMs of rows converted to
    float32 would round less, at three times the time in bfloat16.
    """
    total = weight.new_zeros(weight.shape, dtype=sum_dtype(weight))
    product = weight.new_empty(weight.shape if total.dtype != weight.dtype else 0)
    for patches, rows in image_pieces(plan.image_rows):
        if total.dtype == weight.dtype:
            total.addmm_(grad[rows].t(), patch_features[patches])
        else:
            total += torch.mm(grad[rows].t(), patch_features[patches], out=product)
    return total.to(weight.dtype)


def bias_gradient(grad: Tensor, plan: RowPlan) -> Tensor:
    """[D]."""
    total = grad.new_zeros(grad.shape[1], dtype=sum_dtype(grad))
    for _, rows in image_pieces(plan.image_rows):
        total += grad[rows].sum(0, dtype=total.dtype)
    return total.to(grad.dtype)


def table_gradient(grad: Tensor, num_tokens: int, plan: RowPlan) -> Tensor:
    """[V, D]; tokens that do not occur get zero."""
    out = grad.new_zeros(num_tokens, grad.shape[1])
    starts = plan.token_starts.tolist()
    owners = torch.repeat_interleave(plan.token_starts.diff())  # which of token_ids each of token_rows belongs to
    for begin in range(0, len(plan.token_ids), GEMM_ROWS):
        ids = plan.token_ids[begin : begin + GEMM_ROWS]
        sums = grad.new_zeros(len(ids), grad.shape[1], dtype=sum_dtype(grad))
        span = slice(starts[begin], starts[begin + len(ids)])
        for rows, owner in zip(plan.token_rows[span].split(GEMM_ROWS), owners[span].split(GEMM_ROWS), strict=True):
            sums.index_add_(0, owner - begin, grad[rows].to(sums.dtype))
        out.index_copy_(0, ids, sums.to(out.dtype))
    return out
