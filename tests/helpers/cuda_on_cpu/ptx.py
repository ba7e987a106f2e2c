"""Runs on the CPU the PTX that NVRTC makes of CUDA source: translated to C++, on the fibers of ``fibers.h``.

``CompiledSplice`` is an implementation of ``project_splice`` like ``runner.EmulatedSplice``, from which it differs in
what it executes. Here every access to memory is checked, not only those that go through the kernel's wrapper functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llava_ds.ops import kernel_build, splice_cuda
from tests.helpers.cuda_on_cpu.ptx_translate import translate
from tests.helpers.cuda_on_cpu.runner import HEADERS, EmulatedSplice, Program, Variant, compile_source

TARGET = "compute_80"
OPTIONS = (f"-I{HEADERS}", "-Og", "-w", "-ffp-contract=off")
"""Of the C++ compiler: what the PTX rounds twice is rounded twice, and nobody reads the generated code for style."""


def make_ptx(source: str, macros: Mapping[str, int]) -> str:
    """PTX of a CUDA source.

    Raises BackendUnavailableError without NVRTC, and where the source does not compile.
    """
    image, _ = kernel_build.compile_source(source.encode(), TARGET, macros)
    return image.rstrip(b"\0").decode()


def compile_ptx(ptx: str, folder: Path) -> Program:
    """The kernels of a PTX text; line numbers in errors are the text's. Raises PtxError."""
    return Program(compile_source(translate(ptx), folder, torch.float32, True, OPTIONS))


class CompiledSplice(EmulatedSplice):
    """``splice_cuda`` with the kernel's PTX on the CPU in the driver's place."""

    def program(self, dtype: torch.dtype, vector: bool) -> Program:
        """The PTX of the source; compiled when it is first asked for."""
        variant = Variant(dtype, vector)
        if variant not in self._programs:
            ptx = make_ptx(self._source, splice_cuda.macros(dtype, vector))
            self._programs[variant] = compile_ptx(ptx, self._folder)
        return self._programs[variant]
