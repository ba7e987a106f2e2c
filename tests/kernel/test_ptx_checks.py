"""What the execution of PTX does not let pass: accesses, races and divergence at run time, unknown text before that."""


import pytest
import torch

from tests.helpers.cuda_on_cpu.ptx import compile_ptx
from tests.helpers.cuda_on_cpu.ptx_operands import PtxError
from tests.helpers.cuda_on_cpu.ptx_toys import HEAD, entry
from tests.helpers.cuda_on_cpu.ptx_translate import translate
from tests.helpers.cuda_on_cpu.runner import KernelError, needs_compiler

pytestmark = [
    pytest.mark.kernel,
    needs_compiler,
]

WRONG = {
    "ld.global.u32 %r0, [%d10+2];": "misaligned",
    "st.global.u32 [%d10+16], %r0;": "out of bounds",
    "ld.global.u32 %r0, [%d5];": "misaligned",  # nothing was written to %d5
    "mov.u64 %d0, memory;\nld.global.u32 %r0, [%d0];": "out of bounds",
    "ld.shared.u32 %r0, [%d10];": "out of bounds",
    "ld.shared.u32 %r0, [memory+64];": "out of bounds",
    "mov.u64 %d0, 0;\nld.shared.u32 %r0, [%d0];": "out of bounds",
    "st.shared.u32 [memory], %r10;": "race",
    "setp.eq.s32 %p0, %r10, 3;\n@%p0 bra $over;\nbar.sync 0;\n$over:": "not reached by all",
    "trap;": "trap",
    "mov.b32 %r0, 0;\ndiv.s32 %r0, %r10, %r0;": "division by zero",
    "mov.b32 %r0, 17;\ncp.async.cg.shared.global [memory], [%d10], 16, %r0;": "reads 17",
}


@pytest.fixture(scope="module")
def wrong_text():
    """An entry for each wrong body, named by its place."""
    return HEAD + "".join(entry(f"wrong{i}", body) for i, body in enumerate(WRONG))


@pytest.fixture(scope="module")
def wrong_program(wrong_text, tmp_path_factory):
    return compile_ptx(wrong_text, tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_a_gpu_would_not_survive(number, wrong_text, wrong_program):
    body, message = list(WRONG.items())[number]
    out = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(KernelError, match=message) as caught:
        wrong_program.launch(f"wrong{number}", (out,), (out,), block=(64,), shared_bytes=64)
    line = int(str(caught.value).split("line ")[1].split(",")[0])
    assert wrong_text.splitlines()[line - 1] in body.splitlines()


@pytest.mark.parametrize(
    "statement",
    [
        "add.sat.s32 %r0, %r1, %r2",
        "add.ftz.f32 %f0, %f1, %f2",
        "fma.rz.f32 %f0, %f1, %f2, %f3",
        "add.s32 %r0, %r1",
        "add.s32 %r0, %r1, %r2, %r3",
        "add.s32 %d0, %r1, %r2",
        "add.s32 %r0, %f9, %d2",
        "add.s32 %r0, %r1, 4294967296",
        "selp.s16 %h0, %h1, -32769, %p0",
        "add.s16 %h0, %h1, %h2",
        "add.s32 %r0, %r1, %r20",
        "add.s32 %r0, %r1, %x2",
        "add.s32 %r0, %r1, %laneid",
        "add.f32 %f0, %f1, 1",
        "add.f32 %f0, %f1, 0d3FF0000000000000",
        "add.f64 %d0, %d1, %d2",
        "add.s32 %r0, %r1, 0f3F800000",
        "mov.pred %p0, 1",
        "mov.u32 %r0, %clock",
        "mov.b32 %r0, {%h0, %h1, %h2}",
        "mov.u64 %d0, somewhere",
        "setp.lt.s32 %p0|%p1, %r0, %r1",
        "selp.b32 %r0, %r1, %r2, %r3",
        "@%r0 ret",
        "ld.volatile.global.u32 %r0, [%d0]",
        "ld.global.L1::evict_last.u32 %r0, [%d0]",
        "ld.global.nc.u32 %r0, [%d0]",
        "ld.u32 %r0, [%d0]",
        "ld.global.u8 %h0, [%d0]",
        "ld.global.v2.u32 {%r0}, [%d0]",
        "ld.global.u64 %r0, [%d0]",
        "ld.global.u16 %f0, [%d0]",
        "ld.global.u32 %r0, [%r1]",
        "ld.global.u32 %r0, [memory]",
        "ld.param.u64 %d0, [other_param_0]",
        "ld.param.u32 %r0, [refused_param_0]",
        "bar.sync 1",
        "bar.sync 0, 64",
        "bar.arrive 0, 64",
        "shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1",
        "atom.global.add.f32 %f0, [%d0], %f1",
        "cp.async.ca.shared.global [%r0], [%d0], 4",
        "cp.async.cg.shared.global [%r0], [%d0], 8",
        "cp.async.wait_all",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0, %r1}, [%r2]",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%r2]",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0}, {%r0, %r1}, {%r2}, {%f0}",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%f0}, {%r0}, {%r1}, {%f0}",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r1}, {%f0}",
        "call foo",
        "{ add.s32 %r0, %r1, %r2",
        ".local .align 4 .b8 stack[16]",
        ".shared .align 4 .b8 block[16]",
    ],
)
def test_what_is_not_known_exactly_is_refused(statement):
    text = HEAD + entry("refused", f"{statement};")
    line = text.splitlines().index(f"{statement};") + 1
    with pytest.raises(PtxError, match=f"line {line} of the PTX, in refused"):
        translate(text)


@pytest.mark.parametrize("outside", [".func helper()\n{\nret;\n}\n", ".shared .align 4 .b8 block[16];\n"])
def test_what_stands_outside_the_entries_is_refused(outside):
    with pytest.raises(PtxError, match="outside the entries"):
        translate(HEAD + outside + entry("known", ""))
