"""What the compilers make of the kernel: registers, spills, widths of access, tensor-core instructions.

No GPU is needed: NVRTC compiles for any architecture, and cuobjdump shows the machine code.
"""

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import resources, util
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llava_ds.errors import BackendUnavailableError
from llava_ds.ops.kernel_build import choose_target, compile_source, read_source
from llava_ds.ops.splice_cuda import DTYPE_MACROS, macros

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
GEMMS = {"splice_forward", "splice_grad_features", "splice_grad_weight"}
ENTRIES = GEMMS | {"splice_grad_bias", "splice_grad_table"}
NARROW = (torch.float16, torch.bfloat16)
ATOMICS = ("ATOM", "RED.", "REDG", "SUATOM", "SURED", "UTMARED")
SOURCE = "project_splice.cu"

pytestmark = pytest.mark.kernel

each_arch = pytest.mark.parametrize("arch", ARCHS)
each_dtype = pytest.mark.parametrize("dtype", DTYPE_MACROS, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_way = pytest.mark.parametrize("is_vector", [True, False], ids=["vector", "scalar"])


class Entry(NamedTuple):
    registers: int
    local_bytes: int
    opcodes: Counter

    def starting(self, *prefixes: str) -> set[str]:
        return {opcode for opcode in self.opcodes if opcode.startswith(prefixes)}

    @property
    def loads(self) -> set[str]:
        """Those of data in global memory or (LD) anywhere: row numbers and token ids, of 8 bytes, are left out."""
        return {opcode for opcode in self.starting("LDG.", "LDGSTS.", "LD.") if not opcode.startswith("LDG.E.64")}

    @property
    def stores(self) -> set[str]:
        return self.starting("STG.", "ST.")


class Compiled(NamedTuple):
    log: str
    entries: dict[str, Entry]


def _tool(name: str) -> str:
    """A CUDA tool on PATH, or the one that triton brings, which torch depends on."""
    found = shutil.which(name)
    if found is None and util.find_spec("triton"):
        bundled = resources.files("triton") / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.is_file() else None
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in the triton package")
    return found


def _compile(source: bytes, arch: str, defines: dict[str, int]) -> tuple[bytes, str]:
    try:
        choose_target((8, 0))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return compile_source(source, arch, defines)


def _read(cubin: bytes, folder: Path) -> dict[str, Entry]:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = _tool("cuobjdump")
    usage, code = (
        subprocess.run([tool, flag, str(file)], capture_output=True, text=True, check=True).stdout
        for flag in ("--dump-resource-usage", "-sass")
    )
    resources_of = {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.MULTILINE)
    opcodes = {part.split()[0]: Counter(instruction.findall(part)) for part in code.split("Function : ")[1:]}
    return {name: Entry(*resources_of[name], opcodes[name]) for name in opcodes}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(arch, dtype, is_vector) -> Compiled; each is compiled once, two at a time."""
    source = read_source(SOURCE)

    def work(arch: str, dtype: torch.dtype, is_vector: bool) -> Compiled:
        cubin, log = _compile(source, arch, macros(dtype, is_vector))
        return Compiled(log, _read(cubin, tmp_path_factory.mktemp("cubin")))

    pool = ThreadPoolExecutor(2)
    futures = {way: pool.submit(work, *way) for way in product(ARCHS, DTYPE_MACROS, (True, False))}
    yield lambda *way: futures[way].result()
    pool.shutdown(cancel_futures=True)


def _check_ptxas(log: str, num_entries: int) -> None:
    """Nothing in local memory and nothing to warn of, in what ``ptxas -v`` says."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) == num_entries and set(spills) == {("0", "0", "0")}, log
    assert "warning" not in log.lower(), log


@each_way
@each_dtype
@each_arch
def test_nothing_spills_and_two_blocks_fit(arch, dtype, is_vector, compiled):
    log, found = compiled(arch, dtype, is_vector)
    _check_ptxas(log, len(ENTRIES))
    assert set(found) == ENTRIES
    for name, entry in found.items():
        assert entry.local_bytes == 0 and not entry.starting("LDL", "STL"), name
        # 65536 registers of an SM hold two blocks of 256 threads with 128 registers each.
        limit = 128 if dtype in NARROW and name in GEMMS else 255
        assert 0 < entry.registers <= limit, f"{name} takes {entry.registers} registers"


@each_way
@each_dtype
@each_arch
def test_accesses_have_the_width_of_the_variant(arch, dtype, is_vector, compiled):
    for name, entry in compiled(arch, dtype, is_vector).entries.items():
        accesses = entry.loads | entry.stores
        assert entry.loads and entry.stores, name
        if is_vector:
            assert {opcode for opcode in accesses if ".128" not in opcode} == set(), name
            assert bool(entry.starting("LDGSTS.E.BYPASS.128")) == (name in GEMMS), name
        else:  # an address may be that of any element, and a wider access would be misaligned
            wide = "U16" if dtype in NARROW else "E"
            assert {opcode.removesuffix(".CONSTANT").rsplit(".", 1)[-1] for opcode in accesses} == {wide}, name


@each_way
@each_dtype
@each_arch
def test_16_bit_products_are_on_tensor_cores_and_fp32_is_not(arch, dtype, is_vector, compiled):
    found = compiled(arch, dtype, is_vector).entries
    product = {torch.bfloat16: "HMMA.16816.F32.BF16", torch.float16: "HMMA.16816.F32"}.get(dtype)
    for name, entry in found.items():
        assert not entry.starting(*ATOMICS), f"{name} has atomics: its sums would vary"
        if name not in GEMMS:
            continue
        assert entry.starting("HMMA", "IMMA", "QMMA", "UTC", "WGMMA", "HGMMA") == ({product} if product else set())
        # 128 x 128 outputs by a warp's 64 x 32 of 16 x 8, and two k steps; or 8 x 8 outputs of a thread by 4 k steps.
        assert entry.opcodes[product or "FFMA"] >= (32 if product else 256), name


TOY = b"""
extern "C" __global__ void toy(const float* in, const unsigned short* half, float* out, int n) {
    float held[256];
    for (int i = 0; i < n; ++i) held[(i * 7) % 256] = in[i * 3 + threadIdx.x];
    out[threadIdx.x + 1] = held[n % 64] + half[n];
    atomicAdd(out, held[(n + 7) % 64]);
}
"""


@each_arch
def test_the_reader_sees_local_memory_atomics_and_narrow_accesses(arch, tmp_path):
    cubin, log = _compile(TOY, arch, {})
    toy = _read(cubin, tmp_path)["toy"]
    assert toy.local_bytes >= 1024 and toy.starting("STL") and toy.starting("LDL")
    assert toy.starting(*ATOMICS)
    assert {"LDG.E", "LDG.E.U16"} <= {opcode.removesuffix(".CONSTANT") for opcode in toy.loads}
    assert toy.stores == {"STG.E"}
    with pytest.raises(AssertionError, match="bytes stack frame"):
        _check_ptxas(log, 1)


# Not every combination: nvcc takes seconds for each, and only its front end differs from NVRTC's.
@pytest.mark.parametrize(
    ("arch", "dtype", "is_vector"),
    [
        ("sm_80", torch.bfloat16, True),
        ("sm_90", torch.float16, False),
        ("sm_100", torch.float32, True),
        ("sm_120", torch.bfloat16, False),
    ],
)
def test_nvcc_compiles_the_same_source_without_a_warning(arch, dtype, is_vector, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH; the CUDA toolkit is not installed")
    source = tmp_path / SOURCE
    source.write_bytes(read_source(SOURCE))
    defines = [f"-D{name}={value}" for name, value in macros(dtype, is_vector).items()]
    command = [nvcc, "-cubin", f"-arch={arch}", "-std=c++17", "-Xptxas", "-v", *defines, str(source)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _check_ptxas(done.stderr + done.stdout, len(ENTRIES))
