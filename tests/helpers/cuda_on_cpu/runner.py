"""Runs CUDA source on the CPU: compiled by a C++ compiler with ``shim.h``, launched on torch CPU tensors.

``EmulatedSplice`` is an implementation of ``project_splice`` like ``splice_cpu`` and ``splice_eager``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from llava_ds.ops import splice_cuda
from llava_ds.ops.row_plan import Needs
from llava_ds.schema import RowPlan
from tests.helpers.cuda_on_cpu.buffers import GuardedBuffer

HEADERS = Path(__file__).parent
KERNEL = Path(splice_cuda.__file__).parent / "kernels" / "project_splice.cu"
COMPILER = os.environ.get("CXX", "g++")
COMPILER_COMMAND = shlex.split(COMPILER)
FLAGS = "-std=c++17 -march=native -fPIC -shared -fvisibility=hidden -Wno-unknown-pragmas".split()
CHECKS = (
    "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero,alignment",
    "-fsanitize-undefined-trap-on-error",
)
"""What the compiler adds to the emulation's checks, for a few percent of the time."""
OPTIONS = ("-O1", *CHECKS)
DTYPES = splice_cuda.DTYPE_MACROS
LIMIT_S = 60.0
"""CPU time of a launch; those of the tests take a few seconds at most."""
Argument = Tensor | int | ctypes.c_longlong | None


@functools.cache
def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None where it can."""
    if not COMPILER_COMMAND or shutil.which(COMPILER_COMMAND[0]) is None:
        return f"no C++ compiler {COMPILER!r}"
    command = [*COMPILER_COMMAND, *FLAGS, "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input="_Float16 half = 1;", capture_output=True, text=True)
    return f"{COMPILER} does not compile _Float16; g++ 12 does" if done.returncode else None


needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
"""Of every test that runs a kernel on the CPU."""


class KernelError(RuntimeError):
    """The emulated kernel did what it must not do; the message says what, where and in which thread."""


class _Buffer(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("writable", ctypes.c_int)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("seed", ctypes.c_uint64),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("num_buffers", ctypes.c_int),
        ("limit_s", ctypes.c_double),
    ]


def compile_source(source: str, folder: Path, dtype: torch.dtype, vector: bool, options: Sequence[str] = ()) -> Path:
    """The shared object of a CUDA source, made once for each content; line numbers in errors are the source's.

    ``options`` go to the compiler in place of ``OPTIONS``. ``-Og`` compiles faster, to slower code.

    Raises:
        RuntimeError: the compiler refuses, with what it says.
    """
    entries = re.findall(r'extern "C" __global__ void (?:\w+(?:\([^()]*\))? )?(\w+)\(', source)
    text = f'#line 1 "kernel.cu"\n{source}\n' + "".join(f"CUDA_ON_CPU_ENTRY({name})\n" for name in entries)
    macros = [f"-DSPLICE_DTYPE={DTYPES[dtype]}", f"-DSPLICE_VECTOR={int(vector)}", "-DCUDA_ON_CPU"]
    flags = [*FLAGS, *(options or OPTIONS), *macros]
    command = [*COMPILER_COMMAND, *flags, "-include", str(HEADERS / "shim.h"), "-x", "c++"]
    headers = "".join(path.read_text() for path in sorted(HEADERS.glob("*.h")))
    name = hashlib.sha256("\0".join([*command, headers, text]).encode()).hexdigest()[:24]
    library = folder / f"{name}.so"
    if not library.exists():
        code, part = (folder / f"{name}.{os.getpid()}.{suffix}" for suffix in ("cc", "part"))
        code.write_text(text)
        done = subprocess.run([*command, str(code), "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{COMPILER} does not compile the source:\n{done.stderr}")
        part.rename(library)
    return library


class Program:
    """The kernels of one shared object."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        entry: str,
        values: Sequence[Tensor | int | None],
        written: Sequence[Tensor],
        grid: Sequence[int] = (1,),
        block: Sequence[int] = (splice_cuda.BLOCK,),
        shared_bytes: int = 0,
        seed: int = 0,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Runs the kernel ``entry`` on copies of the tensors; those of ``written`` are brought back.

        Of these the kernel must write each byte once at most, and read none.

        Raises:
            KernelError: a check of the emulation failed.
            TypeError: the values do not fit the kernel's parameters.
        """
        buffers = {
            i: GuardedBuffer(value, any(value is tensor for tensor in written))
            for i, value in enumerate(values)
            if isinstance(value, Tensor)
        }
        numbers = [buffers[i].address if isinstance(value, Tensor) else value for i, value in enumerate(values)]
        typed = self._typed(entry, numbers)
        arguments = (ctypes.c_void_p * len(typed))(*(ctypes.addressof(value) for value in typed))
        described = [_Buffer(buffer.address, buffer.num_bytes, buffer.writable) for buffer in buffers.values()]
        table = (_Buffer * len(described))(*described)
        geometry = _Launch(_three(grid), _three(block), shared_bytes, seed, table, len(table), limit_s)
        launch = self._library[f"launch_{entry}"]
        launch.restype = ctypes.c_char_p
        error = launch(arguments, ctypes.byref(geometry))
        if error:
            raise KernelError(f"{entry}: {error.decode()}")
        for i, buffer in buffers.items():
            if not buffer.copy_back():
                raise KernelError(f"{entry}: wrote before the start of its parameter {i}")

    def num_bank_conflicts(self) -> int:
        """How often ldmatrix had to read a bank of shared memory twice, in all launches."""
        count = self._library.bank_conflicts
        count.restype = ctypes.c_ulonglong
        return count()

    def parameters(self, entry: str) -> str:
        """A letter for each parameter of the kernel: p pointer, i 32-bit integer, l 64-bit integer."""
        parameters = self._library[f"parameters_{entry}"]
        parameters.restype = ctypes.c_char_p
        return parameters().decode()

    def _typed(self, entry: str, values: Sequence[int | None]) -> list[Any]:
        """The values in the types of the kernel's parameters."""
        letters = self.parameters(entry)
        if len(letters) != len(values):
            raise TypeError(f"{entry} has {len(letters)} parameters but got {len(values)} values")
        types: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64}
        return [types[letter](value) for letter, value in zip(letters, values, strict=True)]


def _three(sizes: Sequence[int]) -> ctypes.Array[ctypes.c_uint]:
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


class Variant(NamedTuple):
    """A compiled form of the kernel source."""

    dtype: torch.dtype
    vector: bool


class EmulatedSplice:
    """``splice_cuda`` with the kernel on the CPU in the driver's place: its launches and arguments are the real ones.

    ``seed`` orders the warps and lanes. ``vector`` chooses the form; None leaves the choice to ``splice_cuda``.
    ``source`` may stand for the kernel's own, and ``options`` of the compiler for the usual ones.
    """

    def __init__(
        self,
        folder: Path,
        source: str | None = None,
        seed: int = 0,
        vector: bool | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._source = KERNEL.read_text() if source is None else source
        self._options = options
        self._programs: dict[Variant, Program] = {}
        self.seed = seed
        self.vector = vector

    def program(self, dtype: torch.dtype, vector: bool) -> Program:
        """The compiled source; compiled when it is first asked for."""
        variant = Variant(dtype, vector)
        if variant not in self._programs:
            library = compile_source(self._source, self._folder, dtype, vector, self._options)
            self._programs[variant] = Program(library)
        return self._programs[variant]

    def forward(
        self, patch_features: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, plan: RowPlan
    ) -> Tensor:
        """As ``splice_cuda.forward``; what the kernel does not write stays NaN."""
        with self._in_place_of_the_driver():
            return splice_cuda.forward(patch_features, weight, bias, table, plan)

    def backward(
        self, grad: Tensor, patch_features: Tensor, weight: Tensor, num_tokens: int, plan: RowPlan, needs: Needs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``splice_cuda.backward``; what the kernel does not write stays NaN."""
        with self._in_place_of_the_driver():
            return splice_cuda.backward(grad, patch_features, weight, num_tokens, plan, needs)

    @contextmanager
    def _in_place_of_the_driver(self) -> Iterator[None]:
        replaced: dict[str, Any] = {"_module": self._module, "_argument": lambda value: value}
        if self.vector is not None:
            replaced["is_vector"] = lambda widths, floats: self.vector
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            with patch.multiple(splice_cuda, **replaced):
                yield
        finally:
            torch.use_deterministic_algorithms(before)

    def _module(self, index: int | None, dtype: torch.dtype, vector: bool) -> _Module:
        return _Module(self.program(dtype, vector), self.seed)


class _Module:
    """What ``splice_cuda`` takes for a module loaded on the device."""

    def __init__(self, program: Program, seed: int) -> None:
        self._program = program
        self._seed = seed

    def launch(
        self, entry: str, grid: Sequence[int], block: int, shared_bytes: int, arguments: Sequence[Argument]
    ) -> None:
        """The driver reads as many bytes as the kernel's parameter has: an argument of another size is an error."""
        letters = self._program.parameters(entry)
        for number, (letter, value) in enumerate(zip(letters, arguments, strict=True)):
            if (letter == "i") != isinstance(value, int):
                raise TypeError(f"{entry}: argument {number} ({value!r}) is not of the size of parameter {letter!r}")
        values = [value.value if isinstance(value, ctypes.c_longlong) else value for value in arguments]
        written = [value for value in values if isinstance(value, Tensor)][-1]
        self._program.launch(entry, values, (written,), grid, (block,), shared_bytes, self._seed)
