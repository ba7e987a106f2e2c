"""Each PTX instruction that the translation knows, against its definition in the PTX ISA."""

import itertools
import math
import random

import pytest
import torch

from tests.helpers.cuda_on_cpu import ptx_reference
from tests.helpers.cuda_on_cpu.ptx import compile_ptx
from tests.helpers.cuda_on_cpu.ptx_instructions import EXPRESSIONS, WIDTHS
from tests.helpers.cuda_on_cpu.ptx_toys import HEAD, entry, letter_of
from tests.helpers.cuda_on_cpu.runner import needs_compiler

pytestmark = [
    pytest.mark.kernel,
    needs_compiler,
]

NUM_VALUES = 640
SPECIAL = (
    *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan),
    *(1e-40, -3e-45, 2.0**-126, 2.0**-75, 1e30, -3e38),  # subnormal, or a product that is, or that overflows
    *(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 1.5 * 2**-25, 65519.9, 65520.0),  # between halves
)
LITERALS = {"lop3.b32": ("0x80", "0xE8", "0x96", "0x1B")}
"""Last sources that the ISA wants in the instruction itself."""


def integer_values(rng):
    """Bit patterns: the borders of every width, and random ones of every length."""
    borders = [(1 << width) + step for width in (0, 7, 8, 15, 16, 31, 32, 63) for step in (-1, 0, 1)]
    borders = [value % (1 << 64) for value in (*borders, *(-value for value in borders))]
    return (borders + [rng.getrandbits(rng.randint(1, 64)) for _ in range(NUM_VALUES)])[:NUM_VALUES]


def float_rows(rng):
    """Every pair of special numbers in the first two rows, then usual ones; the other two are a mixture."""
    pairs = list(itertools.product(SPECIAL, repeat=2))
    usual = [rng.gauss(0, 1) * 2.0 ** rng.randint(-20, 20) for _ in range(2 * NUM_VALUES)]
    rows = [[*part, *usual[i::2]][:NUM_VALUES] for i, part in enumerate(zip(*pairs, strict=True))]
    return rows + [rng.sample(row, NUM_VALUES) for row in rows]


@pytest.fixture(scope="module")
def inputs():
    """Four sources of each kind and, as sources 4 to 7, small counts.

    Of the integers every divisor is odd, thus not zero, and every eighth pair is equal.
    """
    rng = random.Random(0)
    words = [integer_values(rng) for _ in range(4)]
    for row in words:
        rng.shuffle(row)
    words[1] = [value | 1 for value in words[1]]
    words[0][::8] = words[1][::8]
    counts = [[rng.randint(0, 70) for _ in range(NUM_VALUES)] for _ in range(4)]
    bits = torch.tensor([*words, *counts], dtype=torch.uint64)
    return bits, torch.tensor(float_rows(rng), dtype=torch.float32)


LOADS = "".join(
    f"""ld.global.u16 %h{j}, [%d16+{j * NUM_VALUES * 8}];
ld.global.u32 %r{j}, [%d16+{j * NUM_VALUES * 8}];
ld.global.u64 %d{j}, [%d16+{j * NUM_VALUES * 8}];
ld.global.u32 %r{4 + j}, [%d16+{(4 + j) * NUM_VALUES * 8}];
ld.global.f32 %f{j}, [%d17+{j * NUM_VALUES * 4}];
and.b32 %r11, %r{j}, 1;
setp.eq.s32 %p{j}, %r11, 1;
"""
    for j in range(4)
)


def is_count(opcode, position):
    """Whether a source is a number of bits rather than a value."""
    return position > 0 and opcode.split(".")[0] in ("shl", "shr") or (opcode == "bfi.b32" and position > 1)


def instances():
    """Every opcode, with each of its literals."""
    for opcode in EXPRESSIONS:
        for literal in LITERALS.get(opcode, (None,)):
            yield opcode, literal


def instruction(opcode, literal, number):
    """One opcode on the sources of its types; its result goes to row ``number`` of parameter 2."""
    result, kinds = EXPRESSIONS[opcode].result, EXPRESSIONS[opcode].sources
    sources = [f"%{letter_of(kind)}{4 + j if is_count(opcode, j) else j}" for j, kind in enumerate(kinds)]
    if literal:
        sources[-1] = literal
    letter = letter_of(result)
    code = f"{opcode} %{letter}9, {', '.join(sources)};\n"
    if letter == "p":
        code, letter = code + "selp.b32 %r9, 1, 0, %p9;\n", "r"
    kind = {"h": "u16", "r": "u32", "d": "u64", "f": "f32"}[letter]
    return f"{code}st.global.{kind} [%d18+{number * NUM_VALUES * 8}], %{letter}9;\n"


def opcode_kernel(chosen):
    """PTX of a kernel that runs the chosen opcodes on every value: inputs as bits and fp32, and the results."""
    places = "".join(f"mad.wide.u32 %d{16 + i}, %r10, {size}, %d{10 + i};\n" for i, size in enumerate((8, 4, 8)))
    code = (instruction(opcode, literal, number) for number, (opcode, literal) in enumerate(chosen))
    return HEAD + entry("opcodes", places + LOADS + "".join(code), 3)


def source_bits(inputs, opcode, literal):
    """For each value the bits of the sources of an opcode."""
    bits, floats = inputs
    columns = []
    for j, kind in enumerate(EXPRESSIONS[opcode].sources):
        row = (floats.view(torch.uint32) if kind == "f32" else bits)[4 + j if is_count(opcode, j) else j].tolist()
        columns.append([value % (1 << WIDTHS[kind]) for value in row])
    if literal:
        columns[-1] = [int(literal, 0)] * NUM_VALUES
    return list(zip(*columns, strict=True))


def test_every_expression_is_what_the_isa_says(inputs, tmp_path):
    chosen = list(instances())
    program = compile_ptx(opcode_kernel(chosen), tmp_path)
    found = torch.zeros(len(chosen), NUM_VALUES, dtype=torch.uint64)
    program.launch("opcodes", (*inputs, found), (found,), block=(NUM_VALUES,))
    wrong = []
    for (opcode, literal), row in zip(chosen, found.tolist(), strict=True):
        for sources, value in zip(source_bits(inputs, opcode, literal), row, strict=True):
            expected = ptx_reference.evaluate(opcode, sources)
            if value != expected:
                wrong.append(f"{opcode} {[hex(s) for s in sources]}: {value:#x}, not {expected:#x}")
                break
    assert not wrong, "\n".join(wrong)


MEMORY = HEAD + entry(
    "spaces",
    """mad.wide.u32 %d16, %r10, 16, %d10;
mad.wide.u32 %d17, %r10, 16, %d11;
mul.lo.s32 %r11, %r10, 16;
mov.u32 %r12, memory;
add.s32 %r12, %r12, %r11;
ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%d16];
st.shared.v2.u32 [%r12+8], {%r0, %r1};
st.shared.v2.b32 [%r12], {%r2, %r3};
ld.shared.v2.u64 {%d0, %d1}, [%r12];
mov.u64 %d2, memory;
cvt.u64.u32 %d3, %r11;
add.s64 %d2, %d2, %d3;
ld.shared.u64 %d4, [%d2+8];
setp.eq.s64 %p0, %d4, %d1;
mov.pred %p1, -1;
and.pred %p2, %p0, %p1;
mov.b64 {%r4, %r5}, %d0;
mov.b32 {%h0, %h1}, %r4;
mov.b32 %r4, {%h1, %h0};
mov.pred %p1, 0;
@%p1 st.global.u32 [%d17], %r10;
ld.global.s16 %r6, [%d16+2];
ld.global.u16 %h2, [%d16+2];
cvt.u32.u16 %r7, %h2;
setp.lt.s32 %p3, %r6, 0;
@!%p3 bra $positive;
cvt.s32.s16 %r0, %r7;
mov.u32 %r1, %r7;
$positive:
@%p2 st.global.v2.u32 [%d17], {%r4, %r5};
st.global.u32 [%d17+8], %r0;
shr.u32 %r8, %r1, 16;
st.global.v2.u16 [%d17+12], {%r1, %r8};""",
    2,
)


def test_memory_of_every_space_and_width(tmp_path):
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-(2**31), 2**31, (64, 4), generator=generator).int()
    found = torch.zeros_like(values)
    compile_ptx(MEMORY, tmp_path).launch("spaces", (values, found), (found,), block=(64,), shared_bytes=1024)
    expected = values[:, [2, 3, 0, 1]].clone()
    expected[:, 0] = values[:, 2] << 16 | values[:, 2] >> 16 & 0xFFFF
    second = values.view(torch.int16)[:, 1].int()
    expected[:, 2] = torch.where(second < 0, second, values[:, 0])
    expected[:, 3] = torch.where(second < 0, second & 0xFFFF, values[:, 1])
    assert 0 < (second < 0).sum() < 64
    assert torch.equal(found, expected)


MATRICES = r"""
mad.wide.u32 %d14, %r10, 16, %d10;
mad.wide.u32 %d15, %r10, 16, %d11;
mov.u32 %r11, memory;
shl.b32 %r12, %r10, 4;
add.s32 %r12, %r12, %r11;
cp.async.cg.shared.global [%r12], [%d14], 16, 16;
cp.async.commit_group;
setp.lt.u32 %p0, %r10, 16;
selp.b32 %r13, 16, 8, %p0;
cp.async.cg.shared.global [%r12+512], [%d15], 16, %r13;
cp.async.commit_group;
cp.async.wait_group 1;
cp.async.wait_group 0;
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%r12];
ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r4, %r5, %r6, %r7}, [%r12+512];
mov.f32 %f0, 0f3F800000;
mov.f32 %f1, %f0;
mov.f32 %f2, 0fC0000000;
mov.f32 %f3, %f2;
mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32
    {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3};
mad.wide.u32 %d16, %r10, 16, %d12;
st.global.v4.f32 [%d16], {%f0, %f1, %f2, %f3};
"""


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_matrices(name, dtype, tmp_path):
    """A [16, 16] and B [16, 8] as the memory has them; of B's second half only eight bytes a row are read."""
    generator = torch.Generator().manual_seed(2)
    a_rows, b_rows = (torch.randn(32, 8, generator=generator).to(dtype) for _ in range(2))
    found = torch.full((32, 4), torch.nan)
    program = compile_ptx(HEAD + entry("matrices", MATRICES.replace("TYPE", name), 3), tmp_path)
    program.launch("matrices", (a_rows, b_rows, found), (found,), block=(32,), shared_bytes=1024)
    top_left, bottom_left, top_right, bottom_right = a_rows.double().view(4, 8, 8)
    a = torch.cat([torch.cat([top_left, top_right], 1), torch.cat([bottom_left, bottom_right], 1)])
    product = a @ b_rows[:16].double() + torch.tensor([1.0, -2.0]).repeat_interleave(8)[:, None]
    # Thread t holds row t / 4, and the row eight below, in two columns each.
    threads = product.view(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4)
    torch.testing.assert_close(found.double(), threads, rtol=0, atol=1e-5)
