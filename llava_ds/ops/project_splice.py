"""Projection of patch features straight into their rows of the LLM's input, between the word embeddings.

The row plan comes from the collator, on the CPU, before the step: nothing here searches for image tokens,
so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llava_ds.ops import splice_cpu, splice_cuda, splice_eager
from llava_ds.ops.row_plan import Needs
from llava_ds.schema import RowPlan


def project_splice(
    patch_features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    plan: RowPlan,
    fused: bool = False,
) -> Tensor:
    """Word embeddings and projected patches (paper, section 4.1: H_v = W Z_v), each in its row.

    Args:
        patch_features: [.., C], flattened to [I * P, C], at least M of them. Patches from M on are a dummy's: they fill
            no row and get a gradient of zero. Without any image row, ``weight`` and ``bias`` get zeros, not None.
        weight: [D, C] of the projector's last (or only) linear layer.
        bias: [D], or None.
        table: [V, D] word embeddings.
        plan: of R rows, M of them images, on the device of the rest; its ids and rows are not checked again here.
        fused: where the table is on a CUDA device in bf16, fp16 or fp32, the CUDA kernel runs; elsewhere this changes
            nothing. ``splice_cuda.why_not_fused`` says beforehand whether it can.

    Returns:
        [R, D]; rows of padding are zero. It can be differentiated once.

    Raises:
        ValueError: dtypes, devices or shapes disagree, or the plan has more image rows than there are patches.
    """
    _check(patch_features, weight, bias, table, plan)
    features = patch_features.reshape(-1, patch_features.shape[-1])  # [.., C] -> [I * P, C]
    rows = plan.src, plan.image_rows, plan.token_ids, plan.token_starts, plan.token_rows
    return _splice(features, weight, bias, table, *rows, fused)


def _check(patch_features: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, plan: RowPlan) -> None:
    """Reads shapes, dtypes and devices only, never values: those would wait for the device."""
    floats = {"patch_features": patch_features, "table": table} | ({} if bias is None else {"bias": bias})
    rows = {
        "plan.src": plan.src,
        "plan.image_rows": plan.image_rows,
        "plan.token_ids": plan.token_ids,
        "plan.token_starts": plan.token_starts,
        "plan.token_rows": plan.token_rows,
    }
    for name, tensor in floats.items():
        if tensor.dtype != weight.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but weight is {weight.dtype}; cast projector, LLM and features to one dtype"
            )
    for name, tensor in rows.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} is {tensor.dtype} but has to be torch.int64, as plan_rows makes it")
    for name, tensor in (floats | rows).items():
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} but weight is on {weight.device}; move them to one device")
    _check_shapes(patch_features, weight, bias, table)
    num_patches, num_rows = patch_features.shape[:-1].numel(), plan.image_rows.shape[0]
    if num_rows > num_patches:
        raise ValueError(f"{num_rows} image rows in the plan but only {num_patches} patches were given")


def _check_shapes(patch_features: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> None:
    fits = weight.ndim == table.ndim == 2 and patch_features.ndim >= 2
    fits = fits and patch_features.shape[-1] == weight.shape[1] and table.shape[1] == weight.shape[0]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            "expected patch_features [.., C], weight [D, C], bias [D] or None and table [V, D]; got "
            f"{list(patch_features.shape)}, {list(weight.shape)}, {None if bias is None else list(bias.shape)} "
            f"and {list(table.shape)}"
        )


def _implementation(tensor: Tensor, fused: bool) -> ModuleType:
    """The module whose ``forward`` and ``backward`` run on this tensor's device."""
    if tensor.device.type == "cpu":
        return splice_cpu
    if fused and tensor.device.type == "cuda" and tensor.dtype in splice_cuda.DTYPE_MACROS:
        return splice_cuda
    return splice_eager


# Both operators are opaque to torch.compile, take plain tensors (their schema is read from the signature) and are
# run with autograd switched off.


@torch.library.custom_op("llava_ds::project_splice", mutates_args=())
def _splice(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    src: Tensor,
    image_rows: Tensor,
    token_ids: Tensor,
    token_starts: Tensor,
    token_rows: Tensor,
    fused: bool,
) -> Tensor:
    plan = RowPlan(src, image_rows, token_ids, token_starts, token_rows)
    with torch.autocast(table.device.type, enabled=False):  # the output is preallocated in the table's dtype
        return _implementation(table, fused).forward(features, weight, bias, table, plan)


@torch.library.custom_op("llava_ds::project_splice_backward", mutates_args=())
def _splice_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    num_tokens: int,
    src: Tensor,
    image_rows: Tensor,
    token_ids: Tensor,
    token_starts: Tensor,
    token_rows: Tensor,
    needs: Sequence[bool],
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = RowPlan(src, image_rows, token_ids, token_starts, token_rows)
    with torch.autocast(grad.device.type, enabled=False):
        return _implementation(grad, fused).backward(grad, features, weight, num_tokens, plan, Needs(*needs))


@_splice.register_fake
def _(features, weight, bias, table, src, image_rows, token_ids, token_starts, token_rows, fused):
    return table.new_empty(src.shape[0], table.shape[1])


@_splice_backward.register_fake
def _(grad, features, weight, num_tokens, src, image_rows, token_ids, token_starts, token_rows, needs, fused):
    shapes = features.shape, weight.shape, weight.shape[:1], (num_tokens, grad.shape[1])
    return tuple(grad.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps no tensor that the wanted gradients do not read, and never the table."""
    features, weight, _, table, *plan, ctx.fused = inputs
    needs = Needs(*ctx.needs_input_grad[:4])
    ctx.shapes, ctx.num_tokens = (features.shape, weight.shape), table.shape[0]
    ctx.save_for_backward(features if needs.weight else None, weight if needs.features else None, *plan)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *operands, src, image_rows, token_ids, token_starts, token_rows = ctx.saved_tensors
    # One element in the shape of what was not kept: of that, the implementations read the shape only.
    features, weight = (
        grad.new_empty(1).expand(shape) if operand is None else operand
        for operand, shape in zip(operands, ctx.shapes, strict=True)
    )
    needs = ctx.needs_input_grad[:4]
    rows = src, image_rows, token_ids, token_starts, token_rows
    grads = _splice_backward(grad, features, weight, ctx.num_tokens, *rows, needs, ctx.fused)
    # The plan's five tensors and the switch have no gradient.
    return *(found if needed else None for found, needed in zip(grads, needs, strict=True)), *[None] * 6


_splice.register_autograd(_backward, setup_context=_save_for_backward)
