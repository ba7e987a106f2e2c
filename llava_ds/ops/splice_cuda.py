"""Projection and splice by the fused CUDA kernel: its launches, and whether it can be used on a device.

Nothing here waits for the device or searches on the host. docs/kernel.md explains the kernel.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from llava_ds.errors import BackendUnavailableError
from llava_ds.ops import kernel_build
from llava_ds.ops.row_plan import Needs
from llava_ds.ops.splice_check import check_implementation
from llava_ds.schema import RowPlan

DTYPE_MACROS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What the kernel computes in, and the value of ``SPLICE_DTYPE`` that says so."""

MIN_CAPABILITY = (8, 0)
"""The first with cp.async and bf16 tensor cores."""

BLOCK = 256
"""Threads of a block, in every launch."""

TILE = 128
"""Rows and columns of the matrix product that one block computes."""

ROWS_A_BLOCK = 8
"""Text or pad rows that one block of the forward kernel copies: one a warp."""

GEMM_SHARED_BYTES = 49152
"""All that a block gets without opting in to more."""

CHUNK_BYTES = 16
"""The widest load and store of a thread."""


class Launch(NamedTuple):
    """One launch of ``entry``, always with ``BLOCK`` threads a block."""

    entry: str
    grid: tuple[int, int]
    shared_bytes: int

    @property
    def is_empty(self) -> bool:
        """There is nothing to do, and CUDA refuses a grid without blocks."""
        return 0 in self.grid


def ceil_div(size: int, part: int) -> int:
    """How many parts cover ``size``."""
    return -(-size // part)


def _tiles(rows: int, columns: int) -> int:
    return ceil_div(rows, TILE) * ceil_div(columns, TILE)


def forward_launch(num_patches: int, num_rows: int, width: int) -> Launch:
    """M patches that fill rows, R rows, LLM width D: the tiles of the projection, then the text and pad rows."""
    return Launch(
        "splice_forward", (_tiles(num_patches, width) + ceil_div(num_rows, ROWS_A_BLOCK), 1), GEMM_SHARED_BYTES
    )


def grad_features_launch(num_patches: int, vision_width: int) -> Launch:
    """[M, C] in tiles."""
    return Launch("splice_grad_features", (_tiles(num_patches, vision_width), 1), GEMM_SHARED_BYTES)


def grad_weight_launch(width: int, vision_width: int) -> Launch:
    """[D, C] in tiles."""
    return Launch("splice_grad_weight", (_tiles(width, vision_width), 1), GEMM_SHARED_BYTES)


def grad_bias_launch(width: int, itemsize: int) -> Launch:
    """[D], four chunks of columns a block, 64 threads down the rows of each; their sums meet in shared memory."""
    columns = 4 * (CHUNK_BYTES // itemsize)
    return Launch("splice_grad_bias", (ceil_div(width, columns), 1), 64 * columns * 4)


def grad_table_launch(num_tokens: int, width: int, itemsize: int) -> Launch:
    """U distinct tokens by D in columns of 32 chunks; the sums of eight warps meet in shared memory."""
    columns = 32 * (CHUNK_BYTES // itemsize)
    return Launch("splice_grad_table", (num_tokens, ceil_div(width, columns)), 8 * columns * 4)


def forward(patch_features: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, plan: RowPlan) -> Tensor:
    """Patches [I * P, C], weight [D, C], bias [D], table [V, D] -> [R, D] in one launch. See ``project_splice``.

    Raises ValueError for a size beyond 32 bits, BackendUnavailableError where ``why_not_fused`` says so.
    """
    num_patches, num_rows, (width, vision_width) = len(plan.image_rows), len(plan.src), weight.shape
    out = table.new_empty(num_rows, width)
    floats = patch_features, weight, bias, table
    sizes = num_patches, num_rows, vision_width, width, ctypes.c_longlong(len(table))
    launch = forward_launch(num_patches, num_rows, width)
    _run(launch, (vision_width, width), *floats, plan.src, plan.image_rows, out, *sizes)
    return out


def backward(
    grad: Tensor, patch_features: Tensor, weight: Tensor, num_tokens: int, plan: RowPlan, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the patches, weight, bias and table from that of the output [R, D]; not needed ones are empty.

    One launch each. Only shapes are read of ``patch_features`` without ``needs.weight`` and of ``weight`` without
    ``needs.features``. Raises as ``forward``.
    """
    grads = tuple(grad.new_empty(0) for _ in needs)
    grad_features, grad_weight, grad_bias, grad_table = grads
    num_patches, (width, vision_width) = len(plan.image_rows), weight.shape
    widths, sizes, grad = (vision_width, width), (num_patches, vision_width, width), grad.contiguous()
    if needs.features:
        grad_features = grad.new_empty(patch_features.shape)
        grad_features[num_patches:].zero_()
        launch = grad_features_launch(num_patches, vision_width)
        _run(launch, widths, grad, weight, plan.image_rows, grad_features, *sizes)
    if needs.weight:
        grad_weight = grad.new_empty(weight.shape)
        launch = grad_weight_launch(width, vision_width)
        _run(launch, widths, grad, patch_features, plan.image_rows, grad_weight, *sizes)
    if needs.bias:
        grad_bias = grad.new_empty(width)
        _run(grad_bias_launch(width, grad.itemsize), (width,), grad, plan.image_rows, grad_bias, num_patches, width)
    if needs.table:
        grad_table = grad.new_zeros(num_tokens, width)
        launch = grad_table_launch(len(plan.token_ids), width, grad.itemsize)
        tokens = plan.token_ids, plan.token_starts, plan.token_rows
        _run(launch, (width,), grad, *tokens, grad_table, width)
    return grad_features, grad_weight, grad_bias, grad_table


def why_not_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be used here, or None where it can: then it is compiled and has passed its check.

    Raises RuntimeError when the check leaves the device unusable.
    """
    if torch.version.hip:
        return "it is a CUDA kernel, and this PyTorch is built for ROCm"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "no CUDA device"
    if dtype not in DTYPE_MACROS:
        return f"it computes in fp32, fp16 and bf16 only, and the model is in {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "it needs compute capability {}.{}, and the device has {}.{}".format(*MIN_CAPABILITY, *capability)
    return _why_it_fails(torch.cuda.current_device() if device.index is None else device.index, dtype)


@functools.cache
def _why_it_fails(index: int, dtype: torch.dtype) -> str | None:
    device = torch.device("cuda", index)
    try:
        return check_implementation(sys.modules[__name__], device, dtype)
    except BackendUnavailableError as error:
        return str(error).splitlines()[0]
    except Exception as error:  # memory, driver, bindings of another version: training can do without the kernel
        failure = f"its check ended in {type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"
        if _answers(device):
            return failure
        raise RuntimeError(
            f"the fused kernel left {device} unusable: {failure}.\n  Start again with model.splice=library."
        ) from error


def _answers(device: torch.device) -> bool:
    """Whether a device still computes; after an illegal access, no call of the process succeeds any more."""
    try:
        torch.cuda.synchronize(device)
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


@functools.cache
def _module(index: int, dtype: torch.dtype, is_vector: bool) -> kernel_build.Module:
    device = torch.device("cuda", index)
    target = kernel_build.choose_target(torch.cuda.get_device_capability(device))
    source = kernel_build.read_source("project_splice.cu")
    image = kernel_build.build(source, target, macros(dtype, is_vector))
    return kernel_build.Module(image, device)


def macros(dtype: torch.dtype, is_vector: bool) -> dict[str, int]:
    """What the source is compiled with."""
    return {"SPLICE_DTYPE": DTYPE_MACROS[dtype], "SPLICE_VECTOR": int(is_vector)}


def is_vector(widths: tuple[int, ...], floats: list[Tensor]) -> bool:
    """Whether rows of these widths, and these tensors, begin and end at whole chunks."""
    chunk = CHUNK_BYTES // floats[0].itemsize
    aligned = all(tensor.data_ptr() % CHUNK_BYTES == 0 for tensor in floats)
    return aligned and all(width % chunk == 0 for width in widths)


def _run(launch: Launch, widths: tuple[int, ...], *arguments: Tensor | int | None | ctypes.c_longlong) -> None:
    """One launch; ``widths`` are those of the rows that it reads and writes, None is a null pointer."""
    too_large = [size for size in arguments if isinstance(size, int) and size >= 2**31]
    if too_large:
        raise ValueError(f"{launch.entry} counts rows and columns in 32 bits, and was given {too_large}")
    if launch.is_empty:
        return
    # These hold copies, where there are any, until the launch is queued; the stream keeps their memory after that.
    held = [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]
    floats = [value for value in held if isinstance(value, Tensor) and value.is_floating_point()]
    device = floats[0].device
    module = _module(device.index, floats[0].dtype, is_vector(widths, floats))
    module.launch(launch.entry, launch.grid, BLOCK, launch.shared_bytes, [_argument(value) for value in held])


def _argument(value: Tensor | int | None | ctypes.c_longlong) -> kernel_build.Argument:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int(value) if isinstance(value, int) else value
