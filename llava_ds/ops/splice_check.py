"""The fused kernel's check of itself on the user's device, before it is used there.

Compilers, drivers and devices are many, and a wrong kernel would spoil a training run without an error. A few layouts
are judged against fp64, with the library's calls in the same dtype as the measure.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.ops import splice_eager
from llava_ds.ops.row_plan import Needs, plan_rows
from llava_ds.schema import RowPlan

FLOOR = 2.0**-20
"""Error allowed in any case, as a part of the largest value: eight units in the last place of fp32.

Two fp32 sums of some hundred products taken in different orders differ by that; a product left out of such a sum is
some thousand times as much. It is nothing beside the rounding of 16-bit results.
"""

NUM_TOKENS = 80


class Layout(NamedTuple):
    """Rows of text with images and padding among them, given by their first row and the one past their last."""

    name: str
    num_rows: int
    images: tuple[tuple[int, int], ...]
    vision_width: int
    width: int
    pads: tuple[tuple[int, int], ...] = ()
    num_dummies: int = 0
    has_bias: bool = True
    shift: int = 0
    """Elements by which every tensor misses an aligned address."""


LAYOUTS = (
    Layout("several images", 300, ((0, 60), (64, 200), (200, 231)), 104, 264, ((260, 300),)),
    Layout("odd sizes", 190, ((9, 142),), 37, 139, ((0, 5), (189, 190)), num_dummies=3),
    Layout("no image", 21, (), 16, 24, num_dummies=2),
    Layout("no bias", 40, ((39, 40),), 8, 8, has_bias=False),
    Layout("images only", 129, ((0, 129),), 40, 16),
    Layout("unaligned", 50, ((10, 20), (30, 33)), 24, 16, ((40, 44),), shift=1),
)
"""Sizes that are whole chunks, and that are not; whole tiles of no dimension."""

CROWDED = Layout("many tiles", 700, ((20, 660),), 1024, 1024)
"""Enough blocks for several to share a multiprocessor, and dozens of k tiles, for a CUDA device; slow elsewhere."""


class Inputs(NamedTuple):
    """What an implementation is given. NaN stands wherever nothing may be read."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    table: Tensor
    grad: Tensor

    def to(self, device: torch.device, dtype: torch.dtype, shift: int = 0) -> Inputs:
        """The same values elsewhere, ``shift`` elements after where an allocation begins."""
        return self.map(lambda tensor: _moved(tensor, device, dtype, shift))

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every tensor changed."""
        bias = None if self.bias is None else change(self.bias)
        return Inputs(change(self.features), change(self.weight), bias, change(self.table), change(self.grad))


@torch.no_grad()
def check_implementation(implementation: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with ``implementation.forward`` or ``.backward`` on the device, or None.

    Every output has an error of at most twice that of ``splice_eager`` in the same dtype, plus ``FLOOR``; rows of text
    and padding are exact, and a second run gives the same bits. Of small whole numbers, whose sums fp32 holds, every
    output is exact but for its one rounding.
    """
    with torch.autocast(device.type, enabled=False):
        for number, layout in enumerate((*LAYOUTS, CROWDED) if device.type == "cuda" else LAYOUTS):
            inputs, plan = make_inputs(layout, dtype, torch.Generator().manual_seed(number))
            failure = _check_layout(implementation, layout, inputs, plan, device)
            failure = failure or _check_whole_numbers(implementation, layout, inputs, plan, device)
            if failure is not None:
                return f"its check fails in {str(dtype).removeprefix('torch.')} with {layout.name}: {failure}"
    return None


def make_inputs(layout: Layout, dtype: torch.dtype, generator: torch.Generator) -> tuple[Inputs, RowPlan]:
    """Random inputs on the CPU, in values that ``dtype`` holds, and their row plan."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(dtype)

    ids = torch.randint(NUM_TOKENS // 2, (1, layout.num_rows), generator=generator, device="cpu") * 2
    ids[0, ::2] = 6  # a token with more rows than the kernel adds at once
    mask = torch.ones_like(ids)
    for begin, end in layout.images:
        ids[0, begin:end] = IMAGE_TOKEN_INDEX
    for begin, end in layout.pads:
        mask[0, begin:end] = 0
    plan = plan_rows(ids, mask)
    num_used = len(plan.image_rows)
    features = randn(num_used + layout.num_dummies, layout.vision_width)
    features[num_used:] = torch.nan
    table, grad = randn(NUM_TOKENS, layout.width), randn(layout.num_rows, layout.width)
    table[1::2] = torch.nan  # ids are even
    grad[mask[0] == 0] = torch.nan
    weight = randn(layout.width, layout.vision_width) / layout.vision_width**0.5  # so that outputs are near 1
    return Inputs(features, weight, randn(layout.width) if layout.has_bias else None, table, grad), plan


def _check_layout(
    implementation: ModuleType, layout: Layout, inputs: Inputs, plan: RowPlan, device: torch.device
) -> str | None:
    dtype = inputs.table.dtype
    here, plan_here = inputs.to(device, dtype, layout.shift), plan.to(device)
    found, again = (_run(implementation, here, plan_here) for _ in range(2))
    peers = _run(splice_eager, here, plan_here)
    exacts = _run(splice_eager, inputs.to(torch.device("cpu"), torch.float64), plan)
    for name in found:
        failure = _judge(found[name], peers[name], exacts[name], plan if name == "forward" else None)
        if failure is not None:
            return f"{name} {failure}"
        if not torch.equal(found[name], again[name]):
            return f"{name} differs between two runs"
    return None


def _check_whole_numbers(
    implementation: ModuleType, layout: Layout, inputs: Inputs, plan: RowPlan, device: torch.device
) -> str | None:
    dtype = inputs.table.dtype
    # Up to 16: sums are too long for 16 bits and round, and fp32 holds them.
    whole = inputs.map(lambda tensor: (tensor * (16 / tensor.nan_to_num().abs().max())).round())
    found = _run(implementation, whole.to(device, dtype, layout.shift), plan.to(device))
    exacts = _run(splice_eager, whole.to(torch.device("cpu"), torch.float64), plan)
    for name in found:
        if not torch.equal(found[name], exacts[name].to(dtype)):
            return f"{name} of whole numbers is not exact"
    return None


def _run(implementation: ModuleType, inputs: Inputs, plan: RowPlan) -> dict[str, Tensor]:
    """All outputs by name, on the CPU."""
    *operands, grad = inputs
    _spoil_free_memory(inputs)
    needs = Needs(True, True, inputs.bias is not None, True)
    grads = implementation.backward(grad, inputs.features, inputs.weight, len(inputs.table), plan, needs)
    names = ("forward", *(f"gradient of {name}" for name in Needs._fields))
    return dict(zip(names, (out.cpu() for out in (implementation.forward(*operands, plan), *grads)), strict=True))


def _spoil_free_memory(inputs: Inputs) -> None:
    """Leaves NaN where outputs will stand, so that an element never written is not right by luck."""
    spoiled = [torch.full_like(tensor, torch.nan) for tensor in inputs if tensor is not None]
    del spoiled


def _judge(found: Tensor, peer: Tensor, exact: Tensor, plan: RowPlan | None) -> str | None:
    """What is wrong with an output; ``plan`` is that of the forward output, whose other rows are copies."""
    if found.shape != exact.shape or found.dtype != peer.dtype:
        return f"is {list(found.shape)} {found.dtype} instead of {list(exact.shape)} {peer.dtype}"
    if plan is not None:
        copied = torch.ones(len(plan.src), dtype=torch.bool, device="cpu").index_fill_(0, plan.image_rows, False)
        if not torch.equal(found[copied].double(), exact[copied]):
            return "has rows of text or padding that are not exact"
    if not exact.numel():
        return None
    error, peer_error = ((tensor.double() - exact).abs().max().item() for tensor in (found, peer))
    if error <= 2 * peer_error + FLOOR * exact.abs().max().item():  # false for NaN
        return None
    return f"is off by {error:.3g} where PyTorch is off by {peer_error:.3g}"


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype, shift: int) -> Tensor:
    room = torch.empty(tensor.numel() + shift, device=device, dtype=dtype)
    return room[shift:].view(tensor.shape).copy_(tensor)
