"""The CPU's splice: its pieces against a slow oracle, its numbers against plain PyTorch, and what it allocates."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.ops import splice_cpu
from llava_ds.ops.row_plan import Needs, plan_rows
from llava_ds.schema import RowPlan
from tests.helpers.allocations import peak_bytes

VOCABULARY = 40
ALL = Needs(features=True, weight=True, bias=True, table=True)
# Run after run: "t" text, "i" image, "p" padding, each with its number of rows.
LAYOUTS = {
    "image_in_the_middle": "t5 i7 t4",
    "image_first_and_last": "i7 t3 i1",
    "only_an_image": "i9",
    "no_image": "t11",
    "only_padding": "p3",
    "adjacent_images_and_padding": "t1 i4 i5 p6 t2 i3 p1",
    "single_rows": "t1 i1 t1 i1 p1 i1",
    "long_runs": f"t2 i{splice_cpu.GEMM_ROWS} t1 i{splice_cpu.PIECE_ROWS + 3} t300",
    "short_between_long": f"i{splice_cpu.GEMM_ROWS + 1} t1 i5 t1 i6 t1 i{splice_cpu.GEMM_ROWS} p2 i3",
    "many_short": "t2 i9 " * 70,
}


def _plan(layout: str, seed: int = 0) -> RowPlan:
    rng = torch.Generator().manual_seed(seed)
    ids, mask = [], []
    for run in layout.split():
        length = int(run[1:])
        tokens = torch.randint(0, VOCABULARY - 3, (length,), generator=rng)  # the last three never occur
        ids.append(torch.full((length,), IMAGE_TOKEN_INDEX) if run[0] == "i" else tokens)
        mask.append(torch.full((length,), run[0] != "p"))
    return plan_rows(torch.cat(ids), torch.cat(mask))


def _shuffled(plan: RowPlan) -> RowPlan:
    order = torch.randperm(len(plan.image_rows), generator=torch.Generator().manual_seed(1))
    return RowPlan(plan.src, plan.image_rows[order], plan.token_ids, plan.token_starts, plan.token_rows)


def _operands(plan: RowPlan, dtype: torch.dtype, vision_width=5, width=7, num_unused=2):
    rng = torch.Generator().manual_seed(2)
    shapes = (len(plan.image_rows) + num_unused, vision_width), (width, vision_width), (width,), (VOCABULARY, width)
    *operands, grad = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in (*shapes, (len(plan.src), width))
    )
    return operands, grad


def _plain(operands, grad, plan):
    """The same by autograd of out-of-place PyTorch: output and the four gradients."""
    features, weight, bias, table = leaves = [one.detach().clone().requires_grad_() for one in operands]
    rows = plan.src.clamp(min=0)
    out = F.embedding(rows, table) * (plan.src >= 0).unsqueeze(1)
    patches = F.linear(features, weight, bias)[: len(plan.image_rows)]
    out = out.index_add(0, plan.image_rows, patches)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _ours(operands, grad, plan, needs=ALL):
    features, weight, _, table = operands
    return [splice_cpu.forward(*operands, plan), *splice_cpu.backward(grad, features, weight, len(table), plan, needs)]


def _pieces_reference(rows: list[int], chunk: int, most: int) -> list[list[int]]:
    """Destination rows piece by piece, grown one patch at a time."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1 and len(runs[-1]) < most:
            runs[-1].append(row)
        else:
            runs.append([row])
    pieces: list[list[int]] = []
    for run in runs:
        if pieces and len(run) < chunk and len(pieces[-1]) < chunk:
            pieces[-1] += run
        else:
            pieces.append(list(run))
    return pieces


def test_runs_against_a_slow_oracle():
    rng = np.random.default_rng(0)
    num_runs = 0
    for step in (0, 1):
        for _ in range(200):
            values = np.cumsum(rng.integers(0, 3, rng.integers(0, 30)))
            runs = splice_cpu.find_runs(values, step)
            assert [row for begin, end in runs for row in range(begin, end)] == list(range(len(values)))
            for begin, end in runs:
                assert (np.diff(values[begin:end]) == step).all()
                assert end == len(values) or values[end] != values[end - 1] + step
            num_runs += len(runs)
    assert num_runs > 1000


def test_pieces_against_a_slow_oracle(monkeypatch):
    rng = np.random.default_rng(0)
    num_views = num_joined = 0
    for _ in range(300):
        chunk = int(rng.integers(1, 9))
        most = chunk + int(rng.integers(0, 9))
        monkeypatch.setattr(splice_cpu, "GEMM_ROWS", chunk)
        monkeypatch.setattr(splice_cpu, "PIECE_ROWS", most)
        rows = np.flatnonzero(rng.random(60) < rng.random())
        if rng.random() < 0.2:
            rng.shuffle(rows)
        pieces = list(splice_cpu.image_pieces(torch.from_numpy(rows)))
        found = [
            list(range(filled.start, filled.stop)) if isinstance(filled, slice) else filled.tolist()
            for _, filled in pieces
        ]
        assert found == _pieces_reference(rows.tolist(), chunk, most)
        ends = np.cumsum([0, *map(len, found)]).tolist()
        assert [(patches.start, patches.stop) for patches, _ in pieces] == list(zip(ends, ends[1:], strict=False))
        joined = sum(isinstance(filled, torch.Tensor) for _, filled in pieces)
        num_joined, num_views = num_joined + joined, num_views + len(pieces) - joined
    assert min(num_joined, num_views) > 300


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shuffled", [False, True], ids=["ascending", "scattered"])
def test_equals_plain_pytorch_in_float64(layout, shuffled):
    plan = _shuffled(_plan(layout)) if shuffled else _plan(layout)
    operands, grad = _operands(plan, torch.float64)
    for name, found, expected in zip(
        ("output", *Needs._fields), _ours(operands, grad, plan), _plain(operands, grad, plan), strict=True
    ):
        # Only the order of at most 1300 additions differs: 1e-16 each.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda text, of=name: f"{of}: {text}")


def test_text_is_copied_bit_by_bit_and_padding_is_zero():
    plan = _plan(LAYOUTS["adjacent_images_and_padding"])
    operands, _ = _operands(plan, torch.bfloat16)
    out = splice_cpu.forward(*operands, plan)
    is_text = plan.src >= 0
    assert is_text.sum() == 3 and torch.equal(out[is_text], operands[-1][plan.src[is_text]])
    assert (plan.src == -1).sum() == 7 and not out[plan.src == -1].any()


def test_without_a_bias():
    for layout in (LAYOUTS["long_runs"], LAYOUTS["many_short"]):
        plan = _plan(layout)
        (features, weight, _, table), grad = _operands(plan, torch.float64)
        expected = _plain((features, weight, torch.zeros(len(weight)).double(), table), grad, plan)[0]
        torch.testing.assert_close(splice_cpu.forward(features, weight, None, table, plan), expected)


def test_unused_patches_and_absent_tokens_get_zeros():
    plan = _plan(LAYOUTS["no_image"])
    operands, grad = _operands(plan, torch.float32)
    features, weight, bias, table = _ours(operands, grad, plan)[1:]
    assert len(features) == 2 and not features.any() and not weight.any() and not bias.any()
    assert table.any() and not table[VOCABULARY - 3 :].any()


@pytest.mark.parametrize(("dtype", "small"), [(torch.bfloat16, 8), (torch.float16, 1)], ids=["bfloat16", "float16"])
def test_16_bit_sums_over_rows_are_kept_in_float32(dtype, small):
    # The first piece, and the first rows of the only token, sum to 4096; in 16 bits that takes up none of the eight
    # sums that follow.
    chunk = splice_cpu.GEMM_ROWS
    plan = _plan(f"i{chunk} t{chunk} " * 9)
    src, rows = plan.src.clamp(max=0), plan.token_rows.sort().values
    plan = RowPlan(src, plan.image_rows, torch.tensor([0]), torch.tensor([0, len(rows)]), rows)
    grad = torch.full((len(src), 3), small / chunk)
    grad[: 2 * chunk] = 4096 / chunk
    operands = torch.ones(9 * chunk, 2), torch.ones(3, 2), torch.ones(3), torch.ones(VOCABULARY, 3)
    _, _, weight, bias, table = _ours([one.to(dtype) for one in operands], grad.to(dtype), plan)
    total = 4096 + 8 * small
    assert torch.tensor(total).to(dtype) == total and torch.tensor(4096).to(dtype) + small == 4096
    assert {*weight.flatten().tolist(), *bias.tolist(), *table[0].tolist()} == {total}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [f"t9000 i{36 * splice_cpu.GEMM_ROWS} p40", "t30 i9 " * 800], ids=["long", "short"])
def test_memory_beyond_the_results_does_not_grow_with_the_rows(dtype, layout):
    plan, width = _plan(layout), 64
    operands, grad = _operands(plan, dtype, vision_width=4, width=width)
    features, weight, _, table = operands
    bound = 1.5 * splice_cpu.PIECE_ROWS * width * 4  # rows in float32, and half as much for all that is small
    for rows in (len(plan.image_rows), len(plan.token_rows)):
        assert rows * width * dtype.itemsize > 2 * bound
    out_bytes = grad.nbytes
    assert out_bytes <= peak_bytes(lambda: splice_cpu.forward(*operands, plan)) <= out_bytes + bound
    grads_bytes = sum(one.nbytes for one in operands)
    peak = peak_bytes(lambda: splice_cpu.backward(grad, features, weight, len(table), plan, ALL))
    assert grads_bytes <= peak <= grads_bytes + bound
