"""The compiled PTX of the kernel, run on the CPU: bit for bit what the source computes there.

It shows what the compiler made of the source: what it reads, keeps in registers, unrolls, and fuses into one rounding.
"""

import functools
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from llava_ds.errors import BackendUnavailableError
from llava_ds.ops import kernel_build
from llava_ds.ops.row_plan import Needs
from llava_ds.ops.splice_cuda import macros
from tests.helpers.cuda_on_cpu.cases import Layout, check_error, check_exact, make_case, names_of, run, torch_reference
from tests.helpers.cuda_on_cpu.ptx import CompiledSplice, compile_ptx, make_ptx
from tests.helpers.cuda_on_cpu.runner import (
    COMPILER_COMMAND,
    DTYPES,
    KERNEL,
    EmulatedSplice,
    KernelError,
    Program,
    needs_compiler,
)

pytestmark = [
    pytest.mark.kernel,
    needs_compiler,
]

FUSED = ("-O1", "-fexpensive-optimizations", "-ffp-contract=fast")
"""The pass of g++ that fuses multiplications and additions belongs to -O2, which takes longer to compile."""

VARIANTS = [(dtype, vector) for dtype in DTYPES for vector in (False, True)]

LAYOUTS = (
    Layout("two tiles each way", "t3 i131 p2", 72, 136, 3),
    Layout("tails", "t9 i5 t2 i70 p1", 41, 13, 4),
    Layout("no image, a dummy patch", "t7", extra_patches=5),
    Layout("image first and last, adjacent", "i9 t4 i3 i4", 15, 9, has_bias=False),
    Layout("one element", "i1", 1, 1, 1),
    Layout("pads and extra patches", "p5 t4 i3 p2", 17, 40, extra_patches=9),
    Layout("more k tiles than stages", "t40 i129", 200, 33, 2),
    Layout("one token in many rows, wide", "t80 i2", 8, 270, 1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        kernel_build.choose_target((8, 0))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("ptx")


@pytest.fixture(scope="module")
def kernels(folder):
    """The kernel as PTX and as source, by whether it is the form with vectors; all compiled side by side.

    NVRTC rounds a product and its sum once. So does a C++ compiler that is asked to, where the CPU can.
    """
    kernels = {
        vector: (CompiledSplice(folder, vector=vector), EmulatedSplice(folder, vector=vector, options=FUSED))
        for vector in (False, True)
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [pool.submit(kernel.program, *variant) for variant in VARIANTS for kernel in kernels[variant[1]]]
    for compiled in made:
        compiled.result()
    return kernels


@functools.cache
def cpu_fuses():
    """Whether code for this CPU has fused multiply-add."""
    command = [*COMPILER_COMMAND, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "__FMA__" in macros or "__ARM_FEATURE_FMA" in macros


def may_round_otherwise(dtype, name):
    """Products of 16-bit numbers are exact in fp32, so fusing changes nothing there."""
    return dtype == torch.float32 and name in ("out", "grad_features", "grad_weight") and not cpu_fuses()


@pytest.mark.parametrize(("dtype", "vector"), VARIANTS, ids=lambda part: str(part).split(".")[-1])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_ptx_computes_what_the_source_computes(kernels, layout, dtype, vector):
    exact, normal = (make_case(layout, dtype, vector, integers) for integers in (True, False))
    compiled, source = kernels[vector]
    check_exact(run(compiled, exact), exact)
    found, expected = run(compiled, normal), run(source, normal)
    check_error(found, normal)
    sizes = torch_reference(normal.absolute())
    for name, tensor, other, size in zip(names_of(normal), found, expected, sizes, strict=True):
        if may_round_otherwise(dtype, name):
            num_terms = max(*normal.weight.shape, len(normal.plan.image_rows)) + 1  # of a sum, at most
            bound = num_terms * torch.finfo(dtype).eps * size  # twice the error of one sum
            assert ((tensor.double() - other.double()).abs() <= bound).all(), name
        else:
            assert torch.equal(tensor, other), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_warps_changes_no_bit(kernels, dtype):
    case = make_case(Layout("", "t9 i70 p3 i66", 70, 137, 5, 2), dtype, True, integers=False)
    compiled, _ = kernels[True]
    first = run(compiled, case)
    for seed in (1, 2):
        with patch.object(compiled, "seed", seed):
            for found, expected in zip(run(compiled, case), first, strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("vector", [False, True])
def test_a_row_that_names_no_token_traps(kernels, vector):
    case = make_case(Layout("", "t12 i3", vocabulary=11), torch.bfloat16, vector, integers=True)
    for token in (11, -3, 2**40):
        case.plan.src[7] = token
        with pytest.raises(KernelError, match="trap"):
            kernels[vector][0].forward(*case[:5])


# ----------------------------------------------------------------------------------------------------------------------
# Faults in the PTX.


class Fault(NamedTuple):
    """The occurrence of ``pattern`` in an entry that is replaced, and the message of the check that notices it.

    The replacement is a template, or a function of the match.
    """

    entry: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    found: str
    occurrence: int = 0


ORDER = "race in shared memory|cp.async of thread"
VALUES = "other bits"
BARRIER = r"bar\.sync\s+0;"
MMA_B = r"(mma\.sync.*?\}, \{.*?\}, \{)(%r\d+), (%r\d+)"


def one_more(wait):
    """A group of copies that may still be under way."""
    return f"wait_group {int(wait[1]) + 1}"


FAULTS = (
    Fault("splice_forward", r"wait_group\s+(\d+)", one_more, "cp.async of thread"),
    Fault("splice_forward", r"cp\.async\.commit_group;", "", "cp.async of thread", -1),
    Fault("splice_forward", r"x4\.shared", "x4.trans.shared", VALUES, 3),
    Fault("splice_forward", MMA_B, r"\1\3, \2", VALUES, 7),
    Fault("splice_forward", r"(cp\.async\.cg.*, )%r\d+;", r"\g<1>8;", VALUES),
    Fault("splice_grad_weight", r"x4\.trans\.shared", "x4.shared", VALUES),
    Fault("splice_grad_table", r"add\.f32", "sub.f32", VALUES),
)

WITH_BARRIERS = ("splice_forward", "splice_grad_bias", "splice_grad_table")
"""Entries of which each barrier is taken away in turn; how many they have is for the compiler to choose."""


def entry_text(ptx, name):
    """One entry of a PTX text."""
    (text,) = re.findall(rf"^\.visible \.entry {name}\(.*?^\}}$", ptx, re.S | re.M)
    return text


def plant(ptx, fault, name):
    """The spoilt entry under another name."""
    text = entry_text(ptx, fault.entry)
    places = list(re.finditer(fault.pattern, text))
    assert len(places) > fault.occurrence, f"{fault} stands nowhere"
    place = places[fault.occurrence]
    new = fault.replacement(place) if callable(fault.replacement) else place.expand(fault.replacement)
    return (text[: place.start()] + new + text[place.end() :]).replace(fault.entry, name)


class Renamed(NamedTuple):
    """A program whose entries end in ``suffix``."""

    program: Program
    suffix: str

    def parameters(self, entry):
        return self.program.parameters(entry + self.suffix)

    def launch(self, entry, *arguments):
        self.program.launch(entry + self.suffix, *arguments)


@pytest.fixture(scope="module")
def spoilt(folder):
    """The faults, with one for each barrier, and a program of all spoilt entries."""
    ptx = make_ptx(KERNEL.read_text(), macros(torch.bfloat16, True))
    counts = {entry: len(re.findall(BARRIER, entry_text(ptx, entry))) for entry in WITH_BARRIERS}
    barriers = (Fault(entry, BARRIER, "", ORDER, i) for entry in WITH_BARRIERS for i in range(counts[entry]))
    faults = [*FAULTS, *barriers]
    entries = (plant(ptx, fault, f"{fault.entry}_{i}") for i, fault in enumerate(faults))
    return faults, compile_ptx(ptx[: ptx.index(".visible .entry")] + "\n".join(entries), folder)


def compute(kernel, case, entry):
    """What one entry computes."""
    if entry == "splice_forward":
        return kernel.forward(*case[:5])
    place = ("splice_grad_features", "splice_grad_weight", "splice_grad_bias", "splice_grad_table").index(entry)
    needs = Needs(*(i == place for i in range(4)))
    return kernel.backward(case.grad, case.patch_features, case.weight, case.table.shape[0], case.plan, needs)[place]


def check_caught(kernels, spoilt, number):
    """Raises unless the spoilt entry stops, or gives other bits than the source, which the sound one does not."""
    faults, program = spoilt
    fault = faults[number]
    case = make_case(Layout("", "t40 i131 p2", 72, 136, 3), torch.bfloat16, True, integers=False)
    compiled, source = kernels[True]
    expected = compute(source, case, fault.entry)
    assert torch.equal(compute(compiled, case, fault.entry), expected)
    with patch.object(compiled, "program", lambda dtype, vector: Renamed(program, f"_{number}")):
        with pytest.raises((KernelError, AssertionError), match=fault.found):
            assert torch.equal(compute(compiled, case, fault.entry), expected), VALUES


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=lambda i: f"{FAULTS[i].entry} {FAULTS[i].pattern}")
def test_a_fault_is_caught(kernels, spoilt, number):
    check_caught(kernels, spoilt, number)


@pytest.mark.parametrize("entry", WITH_BARRIERS)
def test_no_barrier_can_go(kernels, spoilt, entry):
    numbers = [i for i, fault in enumerate(spoilt[0]) if fault.pattern == BARRIER and fault.entry == entry]
    assert len(numbers) >= 2
    for number in numbers:
        check_caught(kernels, spoilt, number)
