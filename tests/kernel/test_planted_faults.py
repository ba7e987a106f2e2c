"""Faults planted in the kernel's source are caught by the checks of test_kernel_source.py: these can fail."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.helpers.cuda_on_cpu.cases import Layout, check_layout, check_offsets
from tests.helpers.cuda_on_cpu.runner import CHECKS, KERNEL, EmulatedSplice, KernelError, needs_compiler

pytestmark = [pytest.mark.kernel, needs_compiler]

EXACT = "elements are wrong"
VALUES = f"{EXACT}|PyTorch's"
"""The results are wrong. The other faults are found as such, by the emulation, whatever the results."""


class Fault(NamedTuple):
    """``old`` stands once in the source; ``found`` is the message of the check that has to notice ``new``."""

    name: str
    old: str
    new: str
    found: str
    dtype: torch.dtype = torch.bfloat16
    vector: bool = True


LOOP_BARRIER = "        barrier();                    // everyone's is;"
STAGE_BARRIER = "        barrier();  // every warp has read what stands in shared memory\n"
STAGED_BARRIER = """        sums.stage(staged, half);
        barrier();
"""
SUM_BARRIER = """        barrier();
        if (row < half)
"""
TAIL_COMMIT = """        }
        cp_async_commit();  // an empty group keeps the count of the waits right
"""
A_LANES = "chunk_offset<true>(line + lane % 16, k0 / VEC + lane / 16)"
A_TRANSPOSED_LANES = "chunk_offset<false>(k0 + lane / 16 * 8 + lane % 8, line / VEC + lane / 8 % 2)"
LOAD_INTO_STAGE = "% STAGES * STAGE_BYTES;\n            load"
B_LANES = "chunk_offset<true>(line + lane / 16 * 8 + lane % 8, k0 / VEC + lane / 8 % 2)"

K_TILES = "num_k_tiles = divide_up(K, TILE_K);"
STAGED = "staged[staged_row * STAGED_PITCH + threadIdx.x % CHUNKS * VEC + i]"
BIASED = f"{STAGED} + bias[i];"
STORE = "    store_tile(sums, output, row0, column0);"
BIAS_ROW = "if (row == 0) store_floats(grad_bias"

FAULTS = (
    # Order: found although the results may be right by luck.
    Fault("no barrier in the main loop", LOOP_BARRIER, "//", "race in shared memory|cp.async of thread"),
    Fault("no barrier in the main loop, fp32", LOOP_BARRIER, "//", "race|cp.async of thread", torch.float32),
    Fault("no barrier in the main loop, scalar", LOOP_BARRIER, "//", "race in shared memory", vector=False),
    Fault("wait too weak", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()", "cp.async of thread"),
    Fault("a stage too few", LOAD_INTO_STAGE, LOAD_INTO_STAGE.replace("STAGES", "2"), "cp.async of thread|race"),
    Fault("no group in the tail", TAIL_COMMIT, "        cp_async_commit();\n        }\n", "cp.async of thread"),
    Fault("barrier not for all", SUM_BARRIER, "        if (row >= half) return;\n" + SUM_BARRIER, "not reached by all"),
    Fault("collective not for all", "mma_16816(values[i][j], a, b[j]);",
          "if (threadIdx.x != 5) mma_16816(values[i][j], a, b[j]);", "divergent collective"),
    # Order, at places that only raw pointers touch: another order of the warps, or poison, spoils the results.
    Fault("no barrier before staging", STAGE_BARRIER, "", VALUES),
    Fault("no barrier after staging", STAGED_BARRIER, "        sums.stage(staged, half);\n", VALUES),
    Fault("no barrier between sums", SUM_BARRIER, "        if (row < half)\n", VALUES),
    # Places.
    Fault("lanes of A", A_LANES, A_LANES.replace("lane % 16", "lane / 2").replace("lane / 16", "lane % 2"), VALUES),
    Fault("lanes of A, transposed", A_TRANSPOSED_LANES,
          "chunk_offset<false>(k0 + lane % 16, line / VEC + lane / 16)", VALUES),
    Fault("lanes of B", B_LANES, A_LANES, VALUES),
    Fault("lanes of C", "(16 * i + c / 2 * 8 + lane / 4)", "(16 * i + c % 2 * 8 + lane / 4)", VALUES),
    Fault("permuted on one side only", "copy_to_shared(tile + chunk_offset<BY_LINE>(row, chunk)",
          "copy_to_shared(tile + row * (BY_LINE ? 64 : 256) + chunk * 16", VALUES),
    Fault("a patch one row too far", "output.scatter[row] :", "output.scatter[row] + 1 :",
          VALUES + "|trap|race in global memory"),
    Fault("a gathered row too far", "operand.gather[row] :", "operand.gather[row] + 1 :", VALUES + "|out of bounds"),
    Fault("tokens one row too far", "table + token * D", "table + (token + 1) * D", VALUES + "|out of bounds"),
    Fault("a row beyond the last", "if (row >= R) return;", "if (row > R) return;", "out of bounds"),
    Fault("a tile's rows beyond the last", "if (row >= output.num_rows ||", "if (row > output.num_rows ||",
          "out of bounds"),
    Fault("chunks beyond the end", "if (left > 0) store16(global", "store16(global", "out of bounds|" + VALUES),
    # Tails.
    Fault("no bias in the tail", "output.bias ? left : 0", "output.bias ? left - left % VEC : 0", VALUES, vector=False),
    Fault("the last k tile is lost", "num_k_tiles = divide_up(K, TILE_K)", "num_k_tiles = K / TILE_K", VALUES),
    Fault("no zeros beyond K", "cp_async16(shared, global, left > 0)", "cp_async16(shared, global, true)", VALUES),
    Fault("no zeros beyond K, scalar", "i < left ? global[i] : from_float(0.f)", "global[i]", VALUES + "|out of bounds",
          vector=False),
    Fault("pads are read", "token == PAD_ROW ? Chunk16{0, 0, 0, 0} : load16", "load16", "out of bounds"),
    # Sums.
    Fault("sums start anew in every tile", "  sums.multiply<", "  sums.clear();\n        sums.multiply<", VALUES),
    Fault("sums start anew in every tile, fp32", "values[i][j] += a[k] * b[j][k]", "values[i][j] = a[k] * b[j][k]",
          VALUES, torch.float32),
    Fault("a token's last row", "end = token_starts[blockIdx.x + 1]", "end = token_starts[blockIdx.x + 1] - 1", VALUES),
    Fault("a token's second row", "if (end - start > 1)", "if (end - start > 2)", VALUES),
    Fault("a bias without most rows", "m < M; m += LANES", "m < M && m < LANES; m += LANES", VALUES),
    Fault("16 k tiles at most", K_TILES, "num_k_tiles = K > 16 * TILE_K ? 16 : divide_up(K, TILE_K);", VALUES),
    # Rounding: only whole numbers tell that it happened twice, or the wrong way.
    Fault("rounded before the bias", BIASED, f"to_float(from_float({STAGED})) + bias[i];", EXACT),
    Fault("cut off, not rounded", "pack.values[i] = from_float(values[i]);",
          "pack.values[i] = Half{static_cast<unsigned short>(__builtin_bit_cast(unsigned, values[i]) >> 16)};", EXACT),
    # Other blocks' results: found although this order of the blocks gives the right values.
    Fault("a tile rewrites another's element", STORE,
          STORE + "\n    if (tile && !threadIdx.x) store16(output.base, load16(output.base));",
          "race in global memory: read"),
    Fault("a bias written by all rows", BIAS_ROW, BIAS_ROW.replace("if (row == 0) ", ""),
          "race in global memory: write"),
)


def narrowed(name: str, place: str, offset: str) -> Fault:
    """An offset that is computed in 32 bits; it stands once in the source with what surrounds it."""
    return Fault(name, place, place.replace(offset, f"static_cast<int>({offset})"), EXACT + "|undefined|out of bounds")


OFFSET_FAULTS = (
    narrowed("32-bit offset of a text row", "out + static_cast<Index>(row) * D", "static_cast<Index>(row) * D"),
    narrowed("32-bit offset of a token", "table + token * D", "token * D"),
    narrowed("32-bit offset of a patch", "target * output.num_columns", "target * output.num_columns"),
    Fault("32-bit gathered row", "Index stored_row(", "int stored_row(", EXACT + "|undefined|out of bounds"),
    narrowed("32-bit offset of a token's row", "grad + token_rows[n] * D", "token_rows[n] * D"),
    narrowed("32-bit offset of a patch's row", "grad + image_rows[m] * D", "image_rows[m] * D"),
    narrowed("32-bit offset of a token's gradient", "token_ids[blockIdx.x] * D", "token_ids[blockIdx.x] * D"),
)

LAYOUTS = (
    Layout("two tiles each way", "t3 i131 p2", 72, 136, 3),
    Layout("tails", "t9 i5 t2 i70 p1", 41, 13, 4),
    Layout("tails of whole chunks", "t40 i9", 24, 40, 5, 2, has_bias=False),
    Layout("33 k tiles in 16 bits", "t1 i3", 1056, 8),
)


def plant(fault: Fault) -> str:
    """The spoilt source."""
    source = KERNEL.read_text()
    assert source.count(fault.old) == 1, f"{fault.name}: stands {source.count(fault.old)} times in the source, not once"
    return source.replace(fault.old, fault.new)


def spoilt(folder: Path, fault: Fault) -> EmulatedSplice:
    """The kernel with the fault."""
    return EmulatedSplice(folder, plant(fault), vector=fault.vector, options=["-Og", *CHECKS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds all spoilt kernels, compiled side by side."""
    folder = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault in (*FAULTS, *OFFSET_FAULTS):
            if KERNEL.read_text().count(fault.old) == 1:
                pool.submit(spoilt(folder, fault).program, fault.dtype, fault.vector)
    return folder


def check_all(kernel: EmulatedSplice, dtype: torch.dtype, vector: bool) -> None:
    """What test_kernel_source.py does for each layout, in two orders of the warps."""
    for kernel.seed in (0, 1):
        for layout in LAYOUTS:
            check_layout(kernel, layout, dtype, vector)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(folder, fault):
    kernel = spoilt(folder, fault)
    with pytest.raises((KernelError, AssertionError), match=fault.found):
        check_all(kernel, fault.dtype, fault.vector)


@pytest.mark.parametrize("fault", OFFSET_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_large_arrays_is_caught(folder, fault):
    with pytest.raises((KernelError, AssertionError), match=fault.found):
        check_offsets(spoilt(folder, fault), fault.dtype, fault.vector)


@pytest.mark.parametrize(("dtype", "vector"), sorted({(f.dtype, f.vector) for f in FAULTS}, key=str))
def test_the_kernel_itself_passes(folder, dtype, vector):
    check_all(EmulatedSplice(folder, vector=vector), dtype, vector)
