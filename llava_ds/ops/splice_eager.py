"""Projection and splice from library calls: any device, no wait for the host, the same result in every run."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llava_ds.constants import PAD_ROW
from llava_ds.ops.row_plan import Needs
from llava_ds.schema import RowPlan

TABLE_COLUMNS = 512
"""Columns of the table's gradient that are summed at a time; all at once would take three times its memory."""


def forward(
    patch_features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    plan: RowPlan,
) -> torch.Tensor:
    """Features [I * P, C], weight [D, C], bias [D] and table [V, D] -> [R, D]; patches from M on fill no row."""
    out = table.index_select(0, plan.src.clamp(min=0))  # any row of the table will do where no token stands
    out.masked_fill_(plan.src.eq(PAD_ROW)[:, None], 0)
    patches = F.linear(patch_features[: len(plan.image_rows)], weight, bias)  # [M, C] -> [M, D]
    return out.index_copy_(0, plan.image_rows, patches)


def backward(
    grad: torch.Tensor,
    patch_features: torch.Tensor,
    weight: torch.Tensor,
    num_tokens: int,
    plan: RowPlan,
    needs: Needs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient [R, D] of the output -> those of the features, weight, bias and table; an empty one where not needed.

    Only shapes are read of ``patch_features`` without ``needs.weight`` and of ``weight`` without ``needs.features``.
    """
    grad_features, grad_weight, grad_bias, grad_table = (grad.new_empty(0) for _ in needs)
    num_used = len(plan.image_rows)
    if needs.features or needs.weight or needs.bias:
        rows = grad.index_select(0, plan.image_rows)  # [M, D]
    if needs.features:
        grad_features = grad.new_zeros(patch_features.shape)
        torch.mm(rows, weight, out=grad_features[:num_used])
    if needs.weight:
        grad_weight = rows.T @ patch_features[:num_used]
    if needs.bias:
        grad_bias = rows.sum(0, dtype=sum_dtype(grad)).to(grad.dtype)
    if needs.table:
        grad_table = _grad_table(grad, num_tokens, plan)
    return grad_features, grad_weight, grad_bias, grad_table


def _grad_table(grad: torch.Tensor, num_tokens: int, plan: RowPlan) -> torch.Tensor:
    """[V, D]; each token's rows are summed in their order, so that no run differs from another."""
    grad_table = grad.new_zeros(num_tokens, grad.shape[1])
    if not len(plan.token_rows):
        return grad_table
    for begin in range(0, grad.shape[1], TABLE_COLUMNS):
        part = slice(begin, begin + TABLE_COLUMNS)
        grad_table[:, part].index_copy_(0, plan.token_ids, _sum_by_token(grad[:, part], plan))
    return grad_table


def _sum_by_token(grad: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """[R, ..] -> [U, ..]; what it allocates is free again before the next columns."""
    rows = grad.index_select(0, plan.token_rows).to(sum_dtype(grad))
    # "unsafe" leaves out a check of the starts, which would wait for the device.
    sums = torch.segment_reduce(rows, "sum", offsets=plan.token_starts, axis=0, unsafe=True)
    return sums.to(grad.dtype)


def sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What sums over rows are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)
