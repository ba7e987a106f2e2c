"""The emulation itself: small kernels that are right pass, and each check finds the fault that it is for."""


import numpy as np
import pytest
import torch

from tests.helpers.cuda_on_cpu import runner
from tests.helpers.cuda_on_cpu.buffers import sparse_zeros
from tests.helpers.cuda_on_cpu.runner import CHECKS, HEADERS, KernelError, Program, compile_source, needs_compiler

pytestmark = [pytest.mark.kernel, needs_compiler]

SHARED_BYTES = 256 * 16
HALVES = [torch.float16, torch.bfloat16]

SOURCE = (HEADERS / "toys.cu").read_text()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The small kernels, for both 16-bit types."""
    folder = tmp_path_factory.mktemp("toys")
    return {dtype: Program(compile_source(SOURCE, folder, dtype, True, ["-Og", *CHECKS])) for dtype in HALVES}


@pytest.fixture(scope="module")
def program(programs):
    """The small kernels in one type."""
    return programs[torch.bfloat16]


def floats(count: int = 1024) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float32)


def nothing(count: int = 1024) -> torch.Tensor:
    return torch.full((count,), torch.nan)


def test_every_thread_of_every_block_runs_once(program):
    out = torch.full((6, 96), -1, dtype=torch.int32)
    program.launch("indices", (out,), (out,), grid=(3, 2), block=(96,))
    expected = torch.arange(6)[:, None] * 1000 + torch.arange(96)
    assert torch.equal(out.long(), expected)


def test_the_seed_gives_the_order(program):
    def order(seed: int) -> list[int]:
        out, following = torch.full((256,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        program.launch("order", (out, following), (out, following), seed=seed)
        assert sorted(out.tolist()) == list(range(256))
        return out.tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    warps = [lane // 32 for lane in order(1)]
    assert warps != sorted(warps)


@pytest.mark.parametrize("distance", [0, 1, 32, 255])
@pytest.mark.parametrize("kernel", ["exchange", "exchange_raw"])
def test_with_a_barrier_all_arrives(program, kernel, distance):
    size = 1024 if kernel == "exchange" else 256
    source, out = floats(size), nothing(size)
    program.launch(kernel, (source, out, distance, 1), (out,), shared_bytes=SHARED_BYTES)
    assert torch.equal(out.view(256, -1), source.view(256, -1).roll(-distance, 0))


@pytest.mark.parametrize("distance", [1, 32, 255])
def test_without_a_barrier_it_is_a_race(program, distance):
    line = SOURCE.splitlines().index("    store16(shared + threadIdx.x * 16, load16(in + threadIdx.x * 4));") + 1
    place = rf"exchange: line ({line}|{line + 2}), thread \(\d+, 0, 0\) of block \(0, 0, 0\)"
    out = nothing()
    with pytest.raises(KernelError, match=rf"{place}: race in shared memory: .* thread \d+ (wrote|read)"):
        program.launch("exchange", (floats(), out, distance, 0), (out,), shared_bytes=SHARED_BYTES)


def test_without_a_barrier_the_own_bytes_are_no_race(program):
    source, out = floats(), nothing()
    program.launch("exchange", (source, out, 0, 0), (out,), shared_bytes=SHARED_BYTES)
    assert torch.equal(out, source)


def test_without_a_barrier_a_raw_pointer_meets_poison(program):
    out = nothing(256)
    program.launch("exchange_raw", (floats(256), out, 32, 0), (out,), shared_bytes=SHARED_BYTES)
    assert 0 < out.isnan().sum() < 256


def test_shared_memory_is_poisoned_in_every_block(program):
    """The second block finds nothing of the first one's."""
    out = nothing(256)
    program.launch("exchange_raw", (floats(256), out, 32, 0), (out,), grid=(4,), shared_bytes=SHARED_BYTES)
    assert out.isnan().any()


def test_a_write_to_what_others_read_is_a_race(program):
    out = nothing()
    program.launch("overwrite", (out, 1), (out,), shared_bytes=SHARED_BYTES)
    assert out.view(torch.int32).view(256, 4)[:, 0].tolist() == [*range(1, 256), 0]
    with pytest.raises(KernelError, match="race in shared memory"):
        program.launch("overwrite", (out, 0), (out,), shared_bytes=SHARED_BYTES)


@pytest.mark.parametrize(
    ("distance", "mode", "message"),
    [
        (1, 1, "read of shared byte .* before the cp.async of thread"),
        (0, 1, "read of shared byte .* before the cp.async of thread"),
        (1, 2, "race in shared memory|before the cp.async of thread"),
        (0, 3, "ends while its cp.async is pending"),
        (0, 6, "before the cp.async of thread"),
    ],
)
def test_a_copy_that_is_not_waited_for(program, distance, mode, message):
    out = nothing()
    with pytest.raises(KernelError, match=message):
        program.launch("asynchronous", (floats(), out, distance, mode), (out,), shared_bytes=SHARED_BYTES)


@pytest.mark.parametrize(("distance", "mode"), [(1, 0), (0, 0), (0, 2)])
def test_a_copy_that_is_waited_for(program, distance, mode):
    source, out = floats(), nothing()
    program.launch("asynchronous", (source, out, distance, mode), (out,), shared_bytes=SHARED_BYTES)
    assert torch.equal(out.view(256, 4), source.view(256, 4).roll(-distance, 0))


def test_a_copy_is_not_there_before_its_wait(program):
    out = torch.zeros(1024)
    program.launch("asynchronous", (floats(), out, 0, 4), (out,), shared_bytes=SHARED_BYTES)
    assert out.view(256, 4)[:, 0].isnan().all()


def test_a_copy_of_nothing_valid_gives_zeros(program):
    out = nothing()
    program.launch("asynchronous", (floats(), out, 1, 5), (out,), shared_bytes=SHARED_BYTES)
    assert torch.equal(out, torch.zeros(1024))


def test_groups_arrive_one_after_the_other(program):
    source, out = floats(768), nothing(768)
    program.launch("groups", (source, out), (out,), block=(64,), shared_bytes=3072)
    assert torch.equal(out, source)


def test_a_copy_over_what_others_read_is_a_race(program):
    out = nothing()
    with pytest.raises(KernelError, match="race in shared memory|before the cp.async of thread"):
        program.launch("copy_over_readers", (floats(), out), (out,), shared_bytes=SHARED_BYTES)


BEYOND = "out of bounds"


@pytest.mark.parametrize(
    ("what", "place", "message"),
    [
        (0, 2, "misaligned access: 16 bytes"), (0, 1024, BEYOND), (0, -4, BEYOND),
        (1, 1, "misaligned access: 16 bytes"), (1, 1024, BEYOND),
        (2, 1024, BEYOND), (3, 1024, BEYOND), (3, -1, BEYOND), (3, 9999, BEYOND),
        (4, 0, BEYOND), (5, 0, "write to read-only buffer 0"),
        (6, 1024, BEYOND), (6, -1, BEYOND), (7, 1, "misaligned access: 16 bytes"), (7, 1024, BEYOND),
        (8, 2, "misaligned access: 16 bytes"), (8, 1024, BEYOND),
        (9, 1, "misaligned access: 16 bytes"), (9, 1024, BEYOND),
        (10, 1024, BEYOND), (11, 0, "trap"), (12, 0, "undefined arithmetic or index"),
        (13, 1000, "undefined arithmetic or index"), (14, 4, "undefined arithmetic or index"),
    ],
)
def test_a_wrong_access(program, what, place, message):
    out = nothing()
    with pytest.raises(KernelError, match=rf"line \d+, thread \(3, 0, 0\) of block \(0, 0, 0\): .*{message}"):
        program.launch("touch", (floats(), out, what, place), (out,), block=(32,), shared_bytes=SHARED_BYTES)


@pytest.mark.parametrize(
    ("what", "place"), [(0, 1020), (1, 1020), (2, 1023), (3, 1023), (6, 1023), (10, 1023), (12, 7), (14, 3)]
)
def test_the_last_elements_may_be_touched(program, what, place):
    out = nothing()
    program.launch("touch", (floats(), out, what, place), (out,), block=(32,), shared_bytes=SHARED_BYTES)


def test_a_write_before_a_buffer_that_begins_within_a_page(program):
    out = nothing(1000)
    with pytest.raises(KernelError, match="wrote before the start of its parameter 1"):
        program.launch("touch", (floats(), out, 3, -1), (out,), block=(32,))


def test_a_write_after_shared_memory_that_ends_within_a_page(program):
    out = nothing(1000)
    with pytest.raises(KernelError, match="write beyond the end of shared memory"):
        program.launch("touch", (floats(), out, 10, 3), (out,), block=(32,), shared_bytes=12)


def test_a_result_may_be_written_once(program):
    out = nothing()
    program.launch("write_once", (out, 0), (out,), grid=(4,), block=(64,))
    assert torch.equal(out.view(torch.int32).view(256, 4), torch.tensor([1, 2, 3, 4], dtype=torch.int32).expand(256, 4))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (1, r"write to buffer 0, byte \d+, which thread \d+ of block [0-3] wrote"),
        (2, r"read of buffer 0, byte \d+, which thread \d+ of block [0-3] wrote"),
        (3, r"read of buffer 0, byte \d+, which is for results"),
    ],
)
def test_a_result_may_not_be_read_or_written_again(program, mode, message):
    out = nothing()
    with pytest.raises(KernelError, match=rf"line \d+, thread .*: race in global memory: {message}"):
        program.launch("write_once", (out, mode), (out,), grid=(4,), block=(64,))


def test_a_large_array_is_taken_in_place(program):
    large, out = sparse_zeros(2**10, 2**20, torch.float32), nothing(4)
    large[0, 1023] = 7
    program.launch("touch", (large, out, 2, 1023), (out,), block=(32,))
    assert out[0] == 7
    program.launch("touch", (out, large, 3, 2**30 - 1), (large,), block=(32,))
    assert large[-1, -1] == 1
    for place in (2**30, -1):
        with pytest.raises(KernelError, match="out of bounds"):
            program.launch("touch", (large, out, 2, place), (out,), block=(32,))


@pytest.mark.parametrize("mode", [0, 1])
def test_a_kernel_without_end_is_ended(program, mode):
    with pytest.raises(KernelError, match="the launch does not end in its time"):
        program.launch("endless", (mode,), (), block=(64,), limit_s=0.2)


def test_a_launch_that_ends_in_its_time(program):
    program.launch("endless", (2,), (), block=(64,), limit_s=0.2)


@pytest.mark.parametrize(
    ("block", "shared_bytes", "message"),
    [(1025, 0, "1 to 1024 threads"), (0, 0, "1 to 1024 threads"), (32, 49153, "at most 49152 bytes of shared memory")],
)
def test_what_a_gpu_does_not_start(program, block, shared_bytes, message):
    with pytest.raises(KernelError, match=message):
        program.launch("read_rows", (16,), (), block=(block,), shared_bytes=shared_bytes)


def test_all_shared_memory_may_be_taken(program):
    program.launch("read_rows", (16,), (), block=(32,), shared_bytes=49152)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ([], "no C++ compiler"),
        (["no-such-compiler", "-m64"], "no C++ compiler"),
        ([*runner.COMPILER_COMMAND, "-D_Float16=unknown"], "does not compile _Float16"),
        ([*runner.COMPILER_COMMAND, "-DMORE=1"], None),
    ],
)
def test_why_there_is_no_compiler(monkeypatch, command, reason):
    monkeypatch.setattr(runner, "COMPILER_COMMAND", command)
    found = runner.why_no_compiler.__wrapped__()
    assert found is None if reason is None else reason in found


def test_the_barrier_is_for_all(program):
    out = nothing(256)
    program.launch("meet", (out, 0), (out,))
    assert torch.equal(out, torch.ones(256))
    elsewhere = r"thread \d+ is at the barrier in line \d+"
    for mode, message in (1, r"thread \d+ ended after line \d+"), (2, elsewhere), (3, elsewhere):
        with pytest.raises(KernelError, match=f"barrier not reached by all: {message}"):
            program.launch("meet", (out, mode), (out,))


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(
    ("transposed", "mode", "message"),
    [
        (0, 1, "divergent collective"), (1, 2, "divergent collective"), (0, 3, "divergent collective"),
        (0, 4, "misaligned access: 16 bytes"),
    ],
)
def test_a_collective_is_for_the_whole_warp(program, block, transposed, mode, message):
    out = torch.zeros(1024, dtype=torch.int32)
    values = (floats(), out, transposed, mode)
    with pytest.raises(KernelError, match=message):
        program.launch("read_matrices", values, (out,), block=(block,), shared_bytes=SHARED_BYTES)


def test_a_warp_of_fewer_lanes_has_no_collectives(program):
    out = torch.zeros(1024, dtype=torch.int32)
    with pytest.raises(KernelError, match="divergent collective: ldmatrix in a warp of 8 lanes"):
        program.launch("read_matrices", (floats(), out, 0, 0), (out,), block=(40,), shared_bytes=SHARED_BYTES)


def test_ldmatrix_of_what_nobody_wrote_is_nan(program):
    out = torch.zeros(128, dtype=torch.int32)
    program.launch("read_matrices", (floats(), out, 0, 5), (out,), block=(32,), shared_bytes=SHARED_BYTES)
    assert (out == -1).all()


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_places_the_elements_as_the_isa_says(program, transposed):
    """PTX ISA, ldmatrix .x4 .m8n8 .b16: lane l holds elements (l / 4, 2 (l % 4) + {0, 1}) of each matrix."""
    values = torch.randperm(256, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    out = torch.zeros(128, dtype=torch.int32)
    source = values.view(torch.float32).clone()
    program.launch("read_matrices", (source, out, transposed, 0), (out,), block=(32,), shared_bytes=SHARED_BYTES)
    matrices = values.numpy().reshape(4, 8, 8)  # lane l gives the address of row l % 8 of matrix l / 8
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    fragments = out.numpy().view(np.int16).reshape(32, 4, 2)  # lane, matrix, half
    assert np.array_equal(fragments.transpose(1, 0, 2).reshape(4, 8, 8), matrices)


@pytest.mark.parametrize(("pitch", "conflicts"), [(16, 0), (80, 0), (32, 4 * 4), (64, 4 * 6), (128, 4 * 7)])
def test_bank_conflicts_are_counted(program, pitch, conflicts):
    before = program.num_bank_conflicts()
    program.launch("read_rows", (pitch,), (), block=(32,), shared_bytes=32 * pitch)
    assert program.num_bank_conflicts() - before == conflicts


def split_a(a: np.ndarray) -> np.ndarray:
    """[16, 16] -> [lane, register, half], PTX ISA, mma.m16n8k16: a0, a1 in row l / 4, a2, a3 eight rows below; ..."""
    quarters = a.reshape(2, 8, 2, 4, 2)  # row half, row, k half, k pair, k
    return quarters.transpose(1, 3, 2, 0, 4).reshape(32, 4, 2)


def split_b(b: np.ndarray) -> np.ndarray:
    """[16, 8] -> [lane, register, half]: rows 2 (l % 4) + {0, 1} of column l / 4, then eight rows below."""
    return b.reshape(2, 4, 2, 8).transpose(3, 1, 0, 2).reshape(32, 2, 2)


def split_c(c: np.ndarray) -> np.ndarray:
    """[16, 8] -> [lane, register]: row l / 4, columns 2 (l % 4) + {0, 1}, then eight rows below."""
    return c.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4)


def bits(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Fragments as 32-bit registers."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.int32).flatten()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("integers", [True, False])
def test_mma_is_the_product(programs, dtype, integers):
    rng = np.random.default_rng(0)
    shapes = (16, 16), (16, 8), (16, 8)
    drawn = (rng.integers(-9, 10, size) if integers else rng.normal(size=size) for size in shapes)
    a, b, c = (values.astype(np.float32) for values in drawn)
    a, b = (torch.from_numpy(x).to(dtype).float().numpy() for x in (a, b))
    out = torch.from_numpy(split_c(c).copy()).flatten()
    programs[dtype].launch("multiply", (bits(split_a(a), dtype), bits(split_b(b), dtype), out), (out,), block=(32,))
    expected = split_c(c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64))
    # 17 terms of a few units, summed in fp32; integers exactly.
    np.testing.assert_allclose(out.numpy().reshape(32, 4), expected, rtol=0, atol=0 if integers else 1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_narrow_numbers_widen_exactly(programs, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = nothing(2**16)
    programs[dtype].launch("widen", (every, out, 2**16), (out,))
    assert torch.equal(out.nan_to_num(12345.0), every.float().nan_to_num(12345.0))


@pytest.mark.parametrize("dtype", HALVES)
def test_floats_narrow_to_the_nearest_even(programs, dtype):
    """All exponents, both signs, subnormals, infinities, and every tie between two neighbours."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    every = torch.arange(2**15).to(torch.int16).view(dtype).double()
    ties = ((every[1:] + every[:-1]) / 2).float()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.99, 65520])
    values = torch.cat([any_bits, ties, -ties, special])
    out = torch.zeros(len(values), dtype=dtype)
    programs[dtype].launch("narrow", (values, out, len(values)), (out,))
    number = ~values.isnan()
    assert out[~number].isnan().all()
    assert torch.equal(out[number].view(torch.int16), values[number].to(dtype).view(torch.int16))


def test_other_machines_switch_stacks_by_ucontext(tmp_path):
    options = ["-Og", "-DCUDA_ON_CPU_UCONTEXT"]
    program = Program(compile_source(SOURCE, tmp_path, torch.bfloat16, True, options))
    source, out = floats(), nothing()
    program.launch("exchange", (source, out, 1, 1), (out,), shared_bytes=SHARED_BYTES)
    assert torch.equal(out.view(256, 4), source.view(256, 4).roll(-1, 0))
    with pytest.raises(KernelError, match="race in shared memory"):
        program.launch("exchange", (source, out, 1, 0), (out,), shared_bytes=SHARED_BYTES)


def test_values_have_to_fit_the_parameters(program):
    with pytest.raises(TypeError, match="indices has 1 parameters but got 2 values"):
        program.launch("indices", (nothing(), 1), ())
