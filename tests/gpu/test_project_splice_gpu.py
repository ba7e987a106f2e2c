"""The compiled kernel on a GPU: right in every dtype and layout, repeatable, without a wait and without a copy.

The same layouts and the same judgement as of the kernel's source on the CPU (tests/kernel).
"""

import subprocess
import sys

import pytest
import torch

from llava_ds.ops import splice_cuda, splice_eager
from llava_ds.ops.project_splice import project_splice
from llava_ds.ops.splice_check import check_implementation
from tests.helpers.cuda_on_cpu.cases import (
    EDGES,
    Case,
    Layout,
    check_error,
    check_exact,
    make_case,
    names_of,
    random_layouts,
    run,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="no CUDA device")

DEVICE = torch.device("cuda")
LAYOUTS = [*EDGES, *random_layouts(200, seed=5)]
LARGE = Layout("as in training", "t40 i576 t200 p3 t35 i576 t602 p16", vision_width=1024, width=4096, vocabulary=3000)
each_dtype = pytest.mark.parametrize("dtype", splice_cuda.DTYPE_MACROS, ids=lambda dtype: str(dtype).split(".")[-1])
each_way = pytest.mark.parametrize("is_vector", [True, False], ids=["vector", "scalar"])


@pytest.fixture(autouse=True)
def kernel_or_skip():
    """Older devices skip by the op's own reason; fp32 is judged by fp32 products, not TF32."""
    capability = torch.cuda.get_device_capability()
    if capability < splice_cuda.MIN_CAPABILITY:
        pytest.skip(splice_cuda.why_not_fused(DEVICE, torch.float32))
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, False
    yield
    settings.allow_tf32 = before


def _case(layout: Layout, dtype: torch.dtype, is_vector: bool = True, integers: bool = False, device=DEVICE) -> Case:
    case = make_case(layout, dtype, is_vector, integers)
    return Case(*(None if part is None else part.to(device) for part in case))


def _leaves(case: Case) -> list[torch.Tensor]:
    return [part.detach().clone().requires_grad_() for part in case[:4]]


def _step(case: Case, fused: bool = True, op=project_splice) -> list[torch.Tensor]:
    """Result and gradients through the public op and autograd."""
    leaves = _leaves(case)
    out = op(*leaves, case.plan, fused=fused)
    out.backward(case.grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@each_dtype
def test_the_kernel_can_be_used(dtype):
    assert splice_cuda.why_not_fused(DEVICE, dtype) is None
    assert check_implementation(splice_eager, DEVICE, dtype) is None


@each_way
@each_dtype
def test_every_layout_is_right(dtype, is_vector):
    assert len(LAYOUTS) > 200
    wrong = []
    for number, layout in enumerate(LAYOUTS):
        try:
            exact = _case(layout, dtype, is_vector, integers=True)
            check_exact(run(splice_cuda, exact), exact)
            normal = _case(layout, dtype, is_vector)
            check_error(run(splice_cuda, normal), normal)
        except AssertionError as error:
            wrong.append(f"{number} {layout}: {error}")
    assert not wrong, "\n".join(wrong)


@each_dtype
def test_sizes_of_training_are_right_and_repeat_bit_by_bit(dtype):
    case = _case(LARGE, dtype)
    first = run(splice_cuda, case)
    check_error(first, case)
    for _ in range(3):
        for name, found, expected in zip(names_of(case), run(splice_cuda, case), first, strict=True):
            assert torch.equal(found, expected), name


@each_dtype
def test_an_unaligned_view_is_right(dtype):
    case = _case(Layout("", "t20 i70 t3", 96, 136), dtype)
    room = torch.empty(case.weight.numel() + 1, device=DEVICE, dtype=dtype)
    unaligned = case._replace(weight=room[1:].view(case.weight.shape).copy_(case.weight))
    assert unaligned.weight.data_ptr() % splice_cuda.CHUNK_BYTES
    for found, expected in zip(run(splice_cuda, unaligned), run(splice_cuda, case), strict=True):
        assert torch.equal(found, expected)


@each_dtype
def test_autograd_gives_the_kernels_gradients(dtype):
    case = _case(Layout("", "t20 i70 t3 i70 p4", 96, 136), dtype)
    for found, expected in zip(_step(case), run(splice_cuda, case), strict=True):
        assert torch.equal(found, expected)
    features, weight, bias, table = _leaves(case)
    project_splice(features, weight, bias, table, case.plan, fused=True).sum().backward()  # a gradient with strides 0
    ones = case._replace(grad=torch.ones_like(case.grad))
    assert torch.equal(table.grad, run(splice_cuda, ones)[-1])


@each_dtype
def test_only_the_gradients_that_are_asked_for(dtype):
    case = _case(Layout("", "t20 i70 t3", 96, 136), dtype)
    everything = run(splice_cuda, case)[1:]
    for number in range(4):
        leaves = [part.detach().requires_grad_(i == number) for i, part in enumerate(case[:4])]
        project_splice(*leaves, case.plan, fused=True).backward(case.grad)
        assert [leaf.grad is not None for leaf in leaves] == [i == number for i in range(4)]
        assert torch.equal(leaves[number].grad, everything[number])


@pytest.fixture
def refuse_waits():
    """An operation that waits for the device raises an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(request):
    case = _case(LARGE, torch.bfloat16)
    first = _step(case)
    request.getfixturevalue("refuse_waits")
    with pytest.raises(RuntimeError, match="synchroniz"):
        case.grad[0, 0].item()
    again = _step(case)
    torch.cuda.set_sync_debug_mode("default")
    for found, expected in zip(again, first, strict=True):
        assert torch.equal(found, expected)


def _forward_peak_bytes(case: Case, fused: bool) -> int:
    """What the forward pass allocates at its peak, beyond what was there."""
    with torch.no_grad():
        project_splice(*case[:4], case.plan, fused=fused)  # cuBLAS takes its workspace once
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        project_splice(*case[:4], case.plan, fused=fused)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def test_forward_allocates_its_result_and_nothing_else():
    case = _case(LARGE, torch.bfloat16)
    result_bytes = len(case.plan.src) * case.table.shape[1] * 2
    patches_bytes = len(case.plan.image_rows) * case.table.shape[1] * 2
    assert patches_bytes > 2**23
    assert _forward_peak_bytes(case, fused=False) >= result_bytes + patches_bytes, "the meter sees projected patches"
    assert _forward_peak_bytes(case, fused=True) <= result_bytes + 2**16


def test_launches_are_in_the_order_of_the_current_stream():
    case = _case(LARGE, torch.bfloat16)
    expected = run(splice_cuda, case)
    late = case._replace(patch_features=torch.zeros_like(case.patch_features), grad=torch.zeros_like(case.grad))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds, which another stream would not wait for
        late.patch_features.copy_(case.patch_features)
        late.grad.copy_(case.grad)
        found = run(splice_cuda, late)
    stream.synchronize()
    for name, one, other in zip(names_of(case), found, expected, strict=True):
        assert torch.equal(one, other), name


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    layout = Layout("", "t20 i70 t3", 96, 136)
    here = run(splice_cuda, _case(layout, torch.bfloat16, device=torch.device("cuda", 0)))
    with torch.cuda.device(0):
        there = run(splice_cuda, _case(layout, torch.bfloat16, device=torch.device("cuda", 1)))
        assert torch.cuda.current_device() == 0
    for found, expected in zip(there, here, strict=True):
        assert found.device.index == 1 and torch.equal(found.cpu(), expected.cpu())


def test_compiled_code_has_no_break():
    """Without the code generator, which needs a C compiler: tracing is what may break."""
    case = _case(Layout("", "t20 i70 t3", 96, 136), torch.bfloat16)
    compiled = torch.compile(project_splice, fullgraph=True, backend="aot_eager")
    for found, expected in zip(_step(case, op=compiled), _step(case), strict=True):
        assert torch.equal(found, expected)


BAD_TOKEN = """
import torch
from llava_ds.ops import splice_cuda
from llava_ds.ops.row_plan import plan_rows
plan = plan_rows(torch.tensor([[1, {token}]])).to(torch.device("cuda"))
table = torch.ones(8, 16, device="cuda")
splice_cuda.forward(torch.ones(0, 16, device="cuda"), torch.ones(16, 16, device="cuda"), None, table, plan)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize(("token", "is_right"), [(7, True), (8, False)])
def test_a_token_beyond_the_table_stops_the_run(token, is_right):
    """In a process of its own: the device is lost to it."""
    program = [sys.executable, "-c", BAD_TOKEN.format(token=token)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.stdout == "done\n") == is_right, done.stderr
    assert is_right or "CUDA error" in done.stderr
