"""Layouts that a fused ``project_splice`` has to get right, and the ways to judge what it computes.

``check_exact``: integers up to 16, whose sums are exact in fp32 in any order (a thousand products stay below 2^24) but
mostly not in 16 bits, so each result is one rounding of the true value and has to be equal to it, bit for bit.
``check_error``: normal numbers; the error against fp64 may be at most twice that of PyTorch's own operators in the same
dtype (the criterion of flash-attention's tests). ``check_offsets``: arrays of more than 2^32 elements.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llava_ds.constants import IMAGE_ROW, IMAGE_TOKEN_INDEX
from llava_ds.ops import splice_cuda
from llava_ds.ops.row_plan import Needs, plan_rows
from llava_ds.schema import RowPlan
from tests.helpers.cuda_on_cpu.buffers import sparse_zeros
from tests.helpers.cuda_on_cpu.runner import EmulatedSplice

NAMES = ("out", "grad_features", "grad_weight", "grad_bias", "grad_table")
WRONG = "elements are wrong"


class Layout(NamedTuple):
    """``rows``: runs of t(ext), i(mage) and p(ad) rows, such as "t3 i16 t2 p1"."""

    name: str
    rows: str
    vision_width: int = 20
    width: int = 19
    vocabulary: int = 11
    extra_patches: int = 0
    has_bias: bool = True


EDGES = (
    Layout("no image", "t9"),
    Layout("no image, a dummy patch", "t7", extra_patches=5),
    Layout("one text row", "t1", vocabulary=1),
    Layout("one patch", "i1"),
    Layout("one patch, one element", "i1", 1, 1, 1),
    Layout("image first", "i6 t5"),
    Layout("image last", "t5 i6", has_bias=False),
    Layout("several images", "t2 i9 t1 i9 t3", 33, 7),
    Layout("adjacent images", "t4 i9 i9 i9", 31, 9, has_bias=False),
    Layout("only images", "i24", 17, 23),
    Layout("pads first", "p5 t4 i3"),
    Layout("pads last", "t4 i3 p9", 16, 40),
    Layout("pads between", "t4 p1 i3 p2 t1", 40, 16),
    Layout("only pads", "p4"),
    Layout("more patches than rows", "t3 i4 t2", extra_patches=9),
    Layout("a tile of patches less one", "t1 i127", 15, 8),
    Layout("a tile of patches", "i128 t2", 16, 5, has_bias=False),
    Layout("a tile of patches and one", "t2 i129", 32, 6, extra_patches=2),
    Layout("a tile of columns less one", "t3 i5", 17, 127),
    Layout("a tile of columns", "t3 i5", 63, 128),
    Layout("a tile of columns and one", "t3 i5", 64, 129),
    Layout("a tile of features and one", "t3 i40", 129, 8, has_bias=False),
    Layout("two tiles each way", "i60 t9 i90", 65, 136),
    Layout("many k tiles", "t2 i7", 200, 33),
    Layout("many k tiles of patches", "i300", 9, 12, extra_patches=1),
    Layout("33 k tiles in 16 bits", "t2 i5", 1056, 24),
    Layout("33 k tiles of columns in 16 bits", "t2 i5", 8, 1056, has_bias=False),
    Layout("35 k tiles of patches in 16 bits", "t1 i1100", 9, 12),
    Layout("one token in many rows", "t150 i2", vocabulary=1),
    Layout("few tokens, wide", "t30 i3 p3", 8, 270, vocabulary=2),
    Layout("a rare vocabulary", "t40 i1", vocabulary=500),
)


def random_layouts(count: int, seed: int) -> list[Layout]:
    """Random runs, sizes on both sides of the tiles' borders, with and without bias and extra patches."""
    rng = random.Random(seed)
    layouts = []
    for number in range(count):
        kinds = rng.choices("ttiip", k=rng.randint(1, 7))
        rows = " ".join(f"{kind}{rng.choice((1, 2, 3, 7, 8, 9, 16, 33, 64, 70))}" for kind in kinds)
        vision_width = rng.choice((1, 3, 8, 15, 16, 17, 24, 31, 32, 33, 48, 50, 96, 130))
        width = rng.choice((1, 2, 5, 7, 8, 9, 16, 31, 64, 65, 120, 131))
        vocabulary = rng.choice((1, 2, 7, 100))
        layouts.append(
            Layout(f"random {number}", rows, vision_width, width, vocabulary, rng.choice((0, 0, 3)), rng.random() < 0.7)
        )
    return layouts


class Case(NamedTuple):
    """What ``project_splice`` is given, and the gradient of its result."""

    patch_features: Tensor
    weight: Tensor
    bias: Tensor | None
    table: Tensor
    plan: RowPlan
    grad: Tensor

    def as_dtype(self, dtype: torch.dtype) -> Case:
        """The same numbers in another type."""
        return self._map(lambda tensor: tensor.to(dtype))

    def absolute(self) -> Case:
        """The absolute values in fp64."""
        return self._map(lambda tensor: tensor.double().abs())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Case:
        bias = None if self.bias is None else change(self.bias)
        features, weight, table, grad = map(change, (self.patch_features, self.weight, self.table, self.grad))
        return Case(features, weight, bias, table, self.plan, grad)


def make_plan(layout: Layout, generator: torch.Generator) -> RowPlan:
    """The plan of one sequence with random token ids."""
    ids: list[int] = []
    mask: list[bool] = []
    for run in layout.rows.split():
        kind, count = run[0], int(run[1:])
        tokens = torch.randint(layout.vocabulary, (count,), generator=generator).tolist()
        ids += tokens if kind != "i" else [IMAGE_TOKEN_INDEX] * count
        mask += [kind != "p"] * count
    return plan_rows(torch.tensor([ids]), torch.tensor([mask]))


def make_case(layout: Layout, dtype: torch.dtype, vector: bool, integers: bool, seed: int = 0) -> Case:
    """Random numbers; ``vector`` rounds both widths up to multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    unit = 16 // dtype.itemsize if vector else 1
    vision_width, width = (-(-size // unit) * unit for size in (layout.vision_width, layout.width))
    plan = make_plan(layout, generator)

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-16, 17, shape, generator=generator).to(dtype)
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return Case(
        numbers(len(plan.image_rows) + layout.extra_patches, vision_width),
        numbers(width, vision_width, scale=vision_width**-0.5),
        numbers(width) if layout.has_bias else None,
        numbers(layout.vocabulary, width),
        plan,
        numbers(len(plan.src), width),
    )


def torch_reference(case: Case) -> list[Tensor]:
    """Result and gradients by PyTorch's own operators and autograd, in the dtype of the case."""
    floats = [part for part in case[:4] if part is not None]
    leaves = [part.detach().clone().requires_grad_() for part in floats]
    features, weight, *bias, table = leaves
    text_rows = (case.plan.src >= 0).nonzero().flatten()
    projected = functional.linear(features[: len(case.plan.image_rows)], weight, *bias)
    out = table.new_zeros(len(case.plan.src), table.shape[1])
    out = out.index_copy(0, text_rows, functional.embedding(case.plan.src[text_rows], table))
    out = out.index_copy(0, case.plan.image_rows, projected)
    grads = torch.autograd.grad(out, leaves, case.grad)
    return [out.detach(), *grads]


def run(implementation: EmulatedSplice | ModuleType, case: Case) -> list[Tensor]:
    """Result and gradients of an implementation, in the order of ``torch_reference``."""
    features, weight, bias, table, plan, grad = case
    out = implementation.forward(features, weight, bias, table, plan)
    needs = Needs(True, True, bias is not None, True)
    grads = implementation.backward(grad, features, weight, table.shape[0], plan, needs)
    return [out, *(found for found, needed in zip(grads, needs, strict=True) if needed)]


def names_of(case: Case) -> list[str]:
    """What the tensors of ``run`` are."""
    return [name for name in NAMES if case.bias is not None or name != "grad_bias"]


def check_exact(found: Sequence[Tensor], case: Case) -> None:
    """Raises AssertionError where a result differs from the true value, rounded once; the case is of integers."""
    truth = torch_reference(case.as_dtype(torch.float64))
    for name, tensor, true in zip(names_of(case), found, truth, strict=True):
        wrong = (tensor != true.to(tensor.dtype)) | tensor.isnan()
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} {WRONG}"


def check_error(found: Sequence[Tensor], case: Case) -> None:
    """Raises AssertionError where an error is above twice PyTorch's plus a floor.

    The floor, for results on which PyTorch happens to be exact: one rounding of the largest value to the dtype,
    and four fp32 roundings of the largest sum of absolute products (fp32 sums differ in their order).
    """
    truth = torch_reference(case.as_dtype(torch.float64))
    same_dtype = torch_reference(case)
    sizes = torch_reference(case.absolute())
    for name, tensor, true, other, size in zip(names_of(case), found, truth, same_dtype, sizes, strict=True):
        if not true.numel():
            continue
        error, allowed = ((value.double() - true).abs().max().item() for value in (tensor, other))
        floor = torch.finfo(tensor.dtype).eps / 2 * true.abs().max().item()
        floor += 4 * torch.finfo(torch.float32).eps * size.max().item()
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, PyTorch's {allowed:.3g}, floor {floor:.3g}"


def check_layout(kernel: EmulatedSplice | ModuleType, layout: Layout, dtype: torch.dtype, vector: bool) -> None:
    """Both checks of one layout, forward and every gradient."""
    exact = make_case(layout, dtype, vector, integers=True)
    check_exact(run(kernel, exact), exact)
    normal = make_case(layout, dtype, vector, integers=False)
    check_error(run(kernel, normal), normal)


def check_offsets(kernel: EmulatedSplice, dtype: torch.dtype, vector: bool) -> None:
    """Raises where a row is lost whose offset in its array has more than 32 bits: of table, output and gradient.

    The last row is that of the one patch, the one before it that of the one token, the last of its vocabulary.
    """
    width, vision_width = 2**15, 8
    num_rows = 2**32 // width + 16
    patch_row, text_row, token = num_rows - 1, num_rows - 2, num_rows - 3
    program = kernel.program(dtype, vector)
    large = partial(sparse_zeros, num_rows, width, dtype)

    def launch(made: splice_cuda.Launch, out: Tensor, *values: Tensor | int | None) -> None:
        program.launch(made.entry, values, (out,), made.grid, shared_bytes=made.shared_bytes)

    features, weight = torch.full((1, vision_width), 2, dtype=dtype), torch.ones(width, vision_width, dtype=dtype)
    src, image_rows = torch.full((num_rows,), IMAGE_ROW), torch.tensor([patch_row])
    src[text_row] = token
    table, out = large(), large()
    table[token] = 5
    sizes = 1, num_rows, vision_width, width, num_rows
    made = splice_cuda.forward_launch(1, num_rows, width)
    launch(made, out, features, weight, None, table, src, image_rows, out, *sizes)
    assert (out[patch_row] == 2 * vision_width).all(), f"out, patch: {WRONG}"
    assert (out[text_row] == 5).all(), f"out, token: {WRONG}"

    grad, grad_table = large(), large()
    grad[patch_row], grad[text_row] = 3, 7
    sizes = 1, vision_width, width
    grad_features, grad_weight, grad_bias = (torch.full_like(like, torch.nan) for like in (features, weight, grad[0]))
    made = splice_cuda.grad_features_launch(1, vision_width)
    launch(made, grad_features, grad, weight, image_rows, grad_features, *sizes)
    made = splice_cuda.grad_weight_launch(width, vision_width)
    launch(made, grad_weight, grad, features, image_rows, grad_weight, *sizes)
    made = splice_cuda.grad_bias_launch(width, dtype.itemsize)
    launch(made, grad_bias, grad, image_rows, grad_bias, 1, width)
    made = splice_cuda.grad_table_launch(1, width, dtype.itemsize)
    tokens = torch.tensor([token]), torch.tensor([0, 1]), torch.tensor([text_row])
    launch(made, grad_table, grad, *tokens, grad_table, width)
    for name, found, true in (
        ("grad_features", grad_features, 3 * width),
        ("grad_weight", grad_weight, 6),
        ("grad_bias", grad_bias, 3),
        ("grad_table", grad_table[token], 7),
    ):
        assert (found == true).all(), f"{name}: {WRONG}"
