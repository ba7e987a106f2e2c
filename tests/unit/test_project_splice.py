"""The op: registration, gradients, and its error beside that of plain PyTorch, on the CPU and as library calls."""

import itertools
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.ops import project_splice as op
from llava_ds.ops import splice_cpu, splice_eager
from llava_ds.ops.project_splice import project_splice
from llava_ds.ops.row_plan import Needs, plan_rows
from llava_ds.schema import RowPlan
from tests.helpers.allocations import peak_bytes

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor takes g++, which is not here")
IMAGE, PAD = IMAGE_TOKEN_INDEX, None
# Rows of a flattened sequence; the last entry is the number of patches, more than image rows with a dummy image.
LAYOUTS = {
    "text, pads, two images": ([1, IMAGE, IMAGE, 5, 1, PAD, 3, IMAGE, 0, IMAGE, 5, PAD], 4),
    "image first and last": ([IMAGE, IMAGE, 2, 2, IMAGE], 3),
    "only images": ([IMAGE] * 4, 4),
    "dummy image": ([4, 4, 0, PAD], 3),
    "no patches": ([4, 4, 0, PAD], 0),
    "more patches than rows": ([PAD, IMAGE, 8], 3),
    "only pads": ([PAD, PAD], 2),
}
NAMES = ("features", "weight", "bias", "table")


def _plan(rows) -> RowPlan:
    ids = torch.tensor([0 if row is PAD else row for row in rows])
    return plan_rows(ids, torch.tensor([row is not PAD for row in rows]))


def _operands(num_patches, vision_width=3, width=4, num_tokens=9, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    """Features [P, C], weight [D, C], bias [D] and table [V, D] that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_patches, vision_width), (width, vision_width), (width,), (num_tokens, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _project_splice_reference(features, weight, bias, table, rows):
    """Plain PyTorch, from the rows and not from a plan."""
    ids = torch.tensor([-1 if row is PAD else row for row in rows])
    text = F.embedding(ids.clamp(min=0), table) * (ids != -1)[:, None]
    where = torch.tensor([row for row, token in enumerate(rows) if token == IMAGE], dtype=torch.long)
    return text.index_put((where,), F.linear(features, weight, bias)[: len(where)])


def _run(function, operands, rows_or_plan, grad):
    """The output and the gradients of the operands that are there."""
    out = function(*operands, rows_or_plan)
    return [out.detach(), *torch.autograd.grad(out, [operand for operand in operands if operand is not None], grad)]


@pytest.fixture(params=[splice_cpu, splice_eager], ids=["cpu", "eager"])
def implementation(request, monkeypatch):
    """Runs the op through one of the modules that can run here."""
    monkeypatch.setattr(op, "_implementation", lambda tensor, fused: request.param)
    return request.param


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
class TestLayouts:
    def test_gradients_are_those_of_finite_differences(self, layout, with_bias, implementation):
        rows, num_patches = LAYOUTS[layout]
        operands, plan = _operands(num_patches), _plan(rows)
        if not with_bias:
            operands[2] = None
        assert torch.autograd.gradcheck(lambda *tensors: project_splice(*tensors, plan), operands)

    def test_equals_plain_pytorch(self, layout, with_bias, implementation):
        rows, num_patches = LAYOUTS[layout]
        operands = _operands(num_patches)
        if not with_bias:
            operands[2] = None
        grad = torch.randn(len(rows), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = _run(project_splice, operands, _plan(rows), grad)
        expected = _run(_project_splice_reference, operands, rows, grad)
        assert len(found) == 4 + with_bias
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-13)  # float64 sums of at most 12 products near 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_operators_are_registered_soundly(layout):
    rows, num_patches = LAYOUTS[layout]
    features, weight, bias, table = _operands(num_patches)
    plan = vars(_plan(rows)).values()
    grad = torch.ones(len(rows), 4, dtype=torch.float64)
    results = [torch.library.opcheck(op._splice, (features, weight, b, table, *plan, False)) for b in (bias, None)]
    constants = features.detach(), weight.detach(), 9
    for needs in ([True] * 4, [False, True, True, False], [True, False, False, False]):
        results.append(torch.library.opcheck(op._splice_backward, (grad, *constants, *plan, needs, False)))
    assert all(len(result) == 4 and set(result.values()) == {"SUCCESS"} for result in results), results


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_as_one_graph_it_gives_the_same(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(project_splice, fullgraph=True, backend=backend, dynamic=dynamic)
    for layout in ("text, pads, two images", "dummy image"):
        rows, num_patches = LAYOUTS[layout]
        operands, plan = _operands(num_patches, dtype=torch.float32), _plan(rows)
        for wanted in ((0, 1, 2, 3), (1, 2), (0,)):
            for index, operand in enumerate(operands):
                operand.requires_grad_(index in wanted)
            grads = []
            for function in (project_splice, compiled):
                out = function(*operands, plan)
                leaves = [operands[index] for index in wanted]
                grads.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0))])
            assert len(grads[0]) == 1 + len(wanted)
            assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def _without_values(mode, dtype):
    """Operands and plan on a CUDA device, which has not to be there: they have all but values."""
    rows, num_patches = LAYOUTS["text, pads, two images"]
    plan, operands = _plan(rows), _operands(num_patches + 2)
    with mode:
        parts = [torch.empty(part.shape, dtype=torch.int64, device="cuda") for part in vars(plan).values()]
        return [torch.empty(operand.shape, dtype=dtype, device="cuda") for operand in operands], RowPlan(*parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
def test_shapes_and_devices_are_known_without_a_gpu(dtype, fused):
    operands, plan = _without_values(mode := FakeTensorMode(), dtype)
    with mode:
        out = project_splice(*operands, plan, fused=fused)
        features, weight, bias, table = operands
        for needs in itertools.product([True, False], repeat=4):
            grads = op._splice_backward(out, features, weight, len(table), *vars(plan).values(), needs, fused)
            shapes = [operand.shape if need else (0,) for operand, need in zip(operands, needs, strict=True)]
            assert [grad.shape for grad in grads] == shapes
            assert {(grad.device.type, grad.dtype) for grad in (out, *grads)} == {("cuda", dtype)}
    assert out.shape == (12, 4)


@pytest.mark.parametrize(
    ("device", "dtype", "fused", "module"),
    [
        ("cpu", torch.float32, True, "splice_cpu"),
        ("cpu", torch.bfloat16, False, "splice_cpu"),
        ("cuda", torch.bfloat16, True, "splice_cuda"),
        ("cuda", torch.float32, True, "splice_cuda"),
        ("cuda", torch.float64, True, "splice_eager"),  # the kernel has no such numbers
        ("cuda", torch.bfloat16, False, "splice_eager"),
        ("meta", torch.float32, True, "splice_eager"),
    ],
)
def test_device_dtype_and_request_choose_the_implementation(device, dtype, fused, module):
    with FakeTensorMode():
        chosen = op._implementation(torch.empty(1, device=device, dtype=dtype), fused)
    assert chosen.__name__ == f"llava_ds.ops.{module}"


def test_the_library_calls_never_wait_for_the_device():
    """A tensor without values refuses whatever reads one: ``item``, ``nonzero``, a boolean index."""
    operands, plan = _without_values(mode := FakeTensorMode(), torch.bfloat16)
    with mode:
        out = splice_eager.forward(*operands, plan)
        grads = splice_eager.backward(out, *operands[:2], 9, plan, Needs(True, True, True, True))
        assert [grad.shape for grad in grads] == [operand.shape for operand in operands]
        with pytest.raises(Exception, match="nonzero"):  # the test can fail
            out[plan.src >= 0]


def test_the_library_calls_sum_the_tables_gradient_in_less_memory_than_it_takes():
    num_rows, width = 2048, 8 * splice_eager.TABLE_COLUMNS
    plan = plan_rows(torch.arange(num_rows)[None] % 50)
    grad = torch.ones(num_rows, width, dtype=torch.bfloat16)
    weight, needs = grad.new_empty(width, 4), Needs(False, False, False, True)
    peak = peak_bytes(lambda: splice_eager.backward(grad, grad.new_empty(1, 4), weight, 50, plan, needs))
    # Of all columns at once the copies would take three times the gradient.
    assert 50 * width * 2 < peak < 0.5 * grad.nbytes


def _random_layout(draw):
    """Rows with images in random places, some of them adjacent, of sizes that no tile divides."""
    image, rows = draw.randint(1, 9), []
    vocabulary = draw.choice([1, 2, 7, 50])
    kinds = draw.choice(["ittttp", "it", "i", "t", "tp", "iip"])
    for _ in range(draw.randint(1, 25)):
        kind = draw.choice(kinds)
        if kind == "i":
            rows += [IMAGE] * image
        else:
            rows += [PAD if kind == "p" else draw.randrange(vocabulary) for _ in range(draw.randint(1, 9))]
    spare = draw.choice([0, image])
    sizes = {"vision_width": draw.randint(1, 40), "width": draw.randint(1, 40), "num_tokens": vocabulary}
    return rows, rows.count(IMAGE) + spare, sizes


def _error_bound(baseline, true):
    eps = torch.finfo(baseline.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps / 2
    return 2 * (baseline - true).abs().max() + eps * true.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, implementation):
    """Against fp64.

    Always allowed, as few numbers can be right by luck in plain PyTorch: to round the exact result to the dtype,
    and four times a partial sum to fp32.
    """
    draw, worst, num_compared = random.Random(7), 0.0, 0
    for layout in range(240):
        rows, num_patches, sizes = _random_layout(draw)
        operands = _operands(num_patches, **sizes, dtype=dtype, seed=layout)
        if layout % 4 == 0:
            operands[2] = None
        exact = [None if operand is None else operand.detach().double().requires_grad_() for operand in operands]
        grad = torch.randn(len(rows), sizes["width"], generator=torch.Generator().manual_seed(layout)).to(dtype)
        results = _run(project_splice, operands, _plan(rows), grad)
        plain = _run(_project_splice_reference, operands, rows, grad)
        truth = _run(_project_splice_reference, exact, rows, grad.double())
        for found, baseline, true in zip(results, plain, truth, strict=True):
            assert found.dtype == dtype and found.shape == true.shape
            if true.numel():
                error, bound = (found - true).abs().max(), _error_bound(baseline, true)
                assert error <= bound, (layout, rows, sizes)
                worst = max(worst, float(error / bound)) if bound else worst
                num_compared += 1
    assert num_compared > 1000 and worst > 0.2, (num_compared, worst)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sums_over_rows_are_exact_up_to_one_rounding(dtype, implementation):
    """Plain PyTorch adds up a table's 16-bit gradient in 16 bit, so that it is no measure. Whole numbers are one.

    The image is one, as the weight's gradient may be rounded once for each.
    """
    rows, generator = [3] * 300 + [IMAGE] * 300, torch.Generator().manual_seed(0)
    operands = _operands(300, dtype=dtype)
    operands[0] = torch.randint(17, (300, 3), generator=generator).to(dtype).requires_grad_()
    grad = torch.randint(17, (600, 4), generator=generator).to(dtype)
    found = _run(project_splice, operands, _plan(rows), grad)[2:]
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    expected = [true.to(dtype) for true in _run(_project_splice_reference, exact, rows, grad.double())[2:]]
    running = torch.zeros(4, dtype=dtype)
    for row in grad[:300]:
        running += row
    assert not torch.equal(running, expected[2][3])  # a sum in 16 bit is found out
    assert len(found) == 3 and all(torch.equal(one, true) for one, true in zip(found, expected, strict=True))


@pytest.mark.parametrize("wanted", [needs for needs in itertools.product([True, False], repeat=4) if any(needs)])
def test_only_the_wanted_gradients_are_computed(wanted, implementation, monkeypatch):
    rows, num_patches = LAYOUTS["text, pads, two images"]
    operands, plan = _operands(num_patches, dtype=torch.float32), _plan(rows)
    grad = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(1))
    every = _run(project_splice, operands, plan, grad)[1:]
    made, original = [], implementation.backward
    monkeypatch.setattr(implementation, "backward", lambda *args: made.extend(original(*args)) or tuple(made))
    leaves = [operand.detach().requires_grad_(need) for operand, need in zip(operands, wanted, strict=True)]
    out = project_splice(*leaves, plan)
    kept = {tensor.data_ptr() for tensor in out.grad_fn.saved_tensors if tensor is not None}
    out.backward(grad)
    for leaf, need, one, expected in zip(leaves, wanted, made, every, strict=True):
        assert torch.equal(leaf.grad, expected) if need else leaf.grad is None and not one.numel()
    features, weight, bias, table = (leaf.data_ptr() in kept for leaf in leaves)
    assert (features, weight, bias, table) == (wanted[1], wanted[0], False, False)


def test_a_batch_without_images_gives_the_projection_zeros(implementation):
    """Not None: under ZeRO every rank has a gradient for every trained parameter."""
    rows, num_patches = LAYOUTS["dummy image"]
    features, weight, bias, table = _operands(num_patches)
    project_splice(features, weight, bias, table, _plan(rows)).sum().backward()
    assert all(torch.equal(operand.grad, torch.zeros_like(operand)) for operand in (features, weight, bias))
    assert table.grad[4].tolist() == [2.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_agree_in_every_bit(dtype, implementation):
    rows, num_patches, sizes = _random_layout(random.Random(3))
    operands, plan = _operands(num_patches, **sizes, dtype=dtype), _plan(rows)
    grad = torch.randn(len(rows), sizes["width"]).to(dtype)
    first, second = (_run(project_splice, operands, plan, grad) for _ in range(2))
    assert len(rows) > 20 and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_any_memory_layout_and_leading_shape_will_do(implementation):
    rows = [IMAGE, 3, IMAGE, IMAGE, IMAGE, 3, PAD, IMAGE, IMAGE]
    features, weight, bias, table = (operand.detach() for operand in _operands(6))
    strided = [
        features.view(2, 3, 3).transpose(0, 1).contiguous().transpose(0, 1),
        weight.T.contiguous().T,
        bias.repeat_interleave(2)[::2],
        torch.cat([table, table], 1)[:, :4],
    ]
    assert not any(operand.is_contiguous() for operand in strided)
    grad = torch.arange(9.0, dtype=torch.float64)[:, None].expand(9, 4)
    plan = _plan(rows)
    for operand in (features, weight, bias, table, *strided):
        operand.requires_grad_()
    found = _run(project_splice, strided, plan, grad)
    expected = _run(project_splice, [features, weight, bias, table], plan, grad)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.reshape(other.shape), other, rtol=0, atol=1e-12)  # float64, sums up to 100


def test_patches_may_fill_their_rows_in_any_order(implementation):
    rows, num_patches = LAYOUTS["text, pads, two images"]
    operands, plan = _operands(num_patches), _plan(rows)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = RowPlan(**vars(plan) | {"image_rows": plan.image_rows[order]})
    grad = torch.randn(len(rows), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = _run(lambda f, *rest: project_splice(f[order], *rest), operands, shuffled, grad)
    for one, other in zip(found, _run(project_splice, operands, plan, grad), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)  # float64 sums of four products near 1


def test_a_table_that_is_the_head_too_gets_the_sum_of_both_gradients(implementation):
    rows, num_patches = LAYOUTS["text, pads, two images"]
    grads = []
    for function, rows_or_plan in ((project_splice, _plan(rows)), (_project_splice_reference, rows)):
        features, weight, bias, table = _operands(num_patches)
        logits = function(features, weight, bias, table, rows_or_plan) @ table.T
        logits.logsumexp(1).sum().backward()
        grads.append(table.grad)
    assert torch.allclose(*grads, rtol=0, atol=1e-12)  # float64, sums up to 100


def _changed(index, change):
    operands = [operand.detach() for operand in _operands(4)]
    operands[index] = change(operands[index])
    return operands


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (_changed(0, torch.Tensor.float), "patch_features is torch.float32 but weight is torch.float64"),
        (_changed(2, torch.Tensor.half), "bias is torch.float16 but weight is torch.float64"),
        (_changed(3, torch.Tensor.bfloat16), "table is torch.bfloat16 but weight is torch.float64"),
        (_changed(3, lambda table: table.to("meta")), "table is on meta but weight is on cpu"),
        (_changed(0, lambda features: features[:, :2]), r"\[4, 2\], \[4, 3\], \[4\] and \[9, 4\]"),
        (_changed(0, lambda features: features[0]), r"\[3\], \[4, 3\], \[4\] and \[9, 4\]"),
        (_changed(1, lambda weight: weight[:2]), r"\[4, 3\], \[2, 3\], \[4\] and \[9, 4\]"),
        (_changed(2, lambda bias: bias[:1]), r"\[4, 3\], \[4, 3\], \[1\] and \[9, 4\]"),
        (_changed(3, lambda table: table[:, :3]), r"\[4, 3\], \[4, 3\], \[4\] and \[9, 3\]"),
        (_changed(0, lambda features: features[:3]), "4 image rows in the plan but only 3 patches were given"),
    ],
)
def test_what_does_not_fit_is_named(operands, message):
    with pytest.raises(ValueError, match=message):
        project_splice(*operands, _plan(LAYOUTS["text, pads, two images"][0]))


@pytest.mark.parametrize("name", ["src", "image_rows", "token_ids", "token_starts", "token_rows"])
def test_a_part_of_the_plan_that_does_not_fit_is_named(name):
    rows, num_patches = LAYOUTS["text, pads, two images"]
    plan, operands = _plan(rows), _operands(num_patches)
    narrow = RowPlan(**vars(plan) | {name: getattr(plan, name).int()})
    with pytest.raises(ValueError, match=f"plan.{name} is torch.int32 but has to be torch.int64"):
        project_splice(*operands, narrow)
    elsewhere = RowPlan(**vars(plan) | {name: getattr(plan, name).to("meta")})
    with pytest.raises(ValueError, match=f"plan.{name} is on meta but weight is on cpu"):
        project_splice(*operands, elsewhere)
