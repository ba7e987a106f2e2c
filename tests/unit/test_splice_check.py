"""The fused kernel's check of itself: right implementations pass, each kind of wrong one is named."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from llava_ds.ops import kernel_build, splice_check, splice_cpu, splice_cuda, splice_eager
from llava_ds.ops.row_plan import Needs
from llava_ds.ops.splice_check import LAYOUTS, check_implementation, make_inputs

CPU = torch.device("cpu")
each_dtype = pytest.mark.parametrize("dtype", splice_cuda.DTYPE_MACROS, ids=lambda dtype: str(dtype).split(".")[-1])


@each_dtype
@pytest.mark.parametrize("implementation", [splice_eager, splice_cpu], ids=["eager", "cpu"])
def test_right_implementations_pass(implementation, dtype):
    assert check_implementation(implementation, CPU, dtype) is None


def test_the_layouts_cover_what_they_are_for():
    chunk = 8  # elements of 16 bytes in 16-bit types
    whole = [layout for layout in LAYOUTS if layout.vision_width % chunk == layout.width % chunk == 0]
    assert any(layout.shift == 0 for layout in whole) and any(layout.shift for layout in whole)
    assert any(layout.vision_width % 2 and layout.width % 2 for layout in LAYOUTS)
    num_patches = [sum(end - begin for begin, end in layout.images) for layout in LAYOUTS]
    assert 0 in num_patches and max(num_patches) > splice_cuda.TILE < max(layout.width for layout in LAYOUTS)
    assert {layout.has_bias for layout in LAYOUTS} == {True, False}
    num_rows_of_a_token = []
    for layout in LAYOUTS:
        inputs, plan = make_inputs(layout, torch.float16, torch.Generator().manual_seed(0))
        num_rows_of_a_token += plan.token_starts.diff().tolist()
        assert len(plan.src) == layout.num_rows and plan.src.eq(-1).sum() == sum(e - b for b, e in layout.pads)
        here = inputs.to(CPU, torch.float32, layout.shift)
        assert splice_cuda.is_vector((8,), [here.weight]) == (not layout.shift)
    assert 1 in num_rows_of_a_token and max(num_rows_of_a_token) > 2 * splice_cuda.BLOCK // 32, "two rows for a warp"


def _changed(forward=None, **gradients):
    """``splice_eager`` with its output, or some gradients, put through a function of (value, the call's arguments)."""

    def changed_forward(*arguments):
        out = splice_eager.forward(*arguments)
        return out if forward is None else forward(out, arguments)

    def changed_backward(*arguments):
        grads = splice_eager.backward(*arguments)
        return tuple(
            gradients[name](grad, arguments) if name in gradients and grad.numel() else grad
            for name, grad in zip(Needs._fields, grads, strict=True)
        )

    return SimpleNamespace(forward=changed_forward, backward=changed_backward)


def _without_bias(out, arguments):
    features, weight, _, table, plan = arguments
    return splice_eager.forward(features, weight, None, table, plan)


def _one_row_on(out, arguments):
    plan = arguments[4]
    rows = out[plan.image_rows]
    return out.index_copy(0, plan.image_rows, rows.roll(1, 0))


def _without_last_bias(out, arguments):
    plan, bias = arguments[4], arguments[2]
    if bias is not None:
        out[plan.image_rows, -1] -= bias[-1]
    return out


def _without_pads(out, arguments):
    out[arguments[4].src == -1] = 1e-3
    return out


def _without_segment(grad, arguments):
    plan = arguments[4]
    grad[plan.token_ids[-1:]] = 0
    return grad


def _without_last_patch(grad, arguments):
    upstream, features, _, _, plan, _ = arguments
    last = plan.image_rows[-1:]
    return grad - upstream[last].T @ features[len(plan.image_rows) - 1 : len(plan.image_rows)]


def _noisy(grad, arguments):
    return grad + torch.rand_like(grad) * 2e-7


def _imprecise(grad, arguments):
    return grad.to(torch.bfloat16).to(grad.dtype)


def _nowhere(grad, arguments):
    grad[..., -1] = torch.nan
    return grad


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (_changed(forward=_without_bias), "with several images: forward is off by .* where PyTorch is off by"),
        (_changed(forward=_without_last_bias), "with several images: forward is off by"),
        (_changed(forward=_one_row_on), "with several images: forward is off by"),
        (_changed(forward=_without_pads), "images: forward has rows of text or padding that are not exact"),
        (_changed(forward=lambda out, _: out.roll(1, 0)), "with several images: forward has rows of text"),
        (_changed(forward=lambda out, _: out[:-1]), r"forward is \[299, 264\] torch.float32 instead of \[300, 264\]"),
        (_changed(features=lambda grad, _: grad.clone().roll(1, 0)), "gradient of features is off by"),
        (_changed(features=lambda grad, _: grad.nan_to_num(0) + 0 * grad.new_ones(1) / 0), "features is off by nan"),
        (_changed(weight=lambda grad, _: grad.T.reshape(grad.shape)), "gradient of weight is off by"),
        (_changed(weight=_without_last_patch), "gradient of weight is off by"),
        (_changed(weight=_imprecise), "gradient of weight is off by"),
        (_changed(weight=_nowhere), "gradient of weight is off by nan"),
        (_changed(bias=lambda grad, _: grad * 1.001), "gradient of bias is off by"),
        (_changed(bias=_noisy), "with .*: gradient of bias differs between two runs"),
        (_changed(table=_without_segment), "gradient of table is off by"),
        (_changed(table=lambda grad, _: grad.to(torch.float64)), "gradient of table is .* torch.float64 instead"),
    ],
)
def test_wrong_implementations_are_named(broken, says):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failure = check_implementation(broken, CPU, torch.float32)
    assert failure is not None and failure.startswith("its check fails in float32 with ")
    with pytest.raises(RuntimeError, match=says):
        raise RuntimeError(failure)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_sums_are_caught(dtype):
    """A sum kept in 16 bits is off by many roundings where a right one is off by one."""

    def summed(grad, arguments):
        plan, total = arguments[4], torch.zeros_like(grad)
        for row in arguments[0][plan.image_rows]:
            total += row
        return total

    assert "gradient of bias is off by" in check_implementation(_changed(bias=summed), CPU, dtype)


def test_an_error_below_one_rounding_is_caught_by_whole_numbers():
    """Sums that are off by 0.1 % before they are rounded to bf16, by 0.4 %, stay within twice PyTorch's error."""

    def scaled(_, arguments):
        upstream, features, _, _, plan, _ = arguments
        total = upstream[plan.image_rows].double().T @ features[: len(plan.image_rows)].double()
        return (total * 1.001).to(upstream.dtype)

    failure = check_implementation(_changed(weight=scaled), CPU, torch.bfloat16)
    assert "gradient of weight of whole numbers is not exact" in str(failure)


def test_arguments_have_the_types_of_the_kernel():
    tensor = torch.ones(3)
    found = [splice_cuda._argument(value) for value in (tensor, None, -3, ctypes.c_longlong(2**40))]
    assert [type(value) for value in found] == [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong]
    assert [value.value for value in found] == [tensor.data_ptr(), None, -3, 2**40]


def test_sizes_beyond_32_bits_are_refused(monkeypatch):
    monkeypatch.setattr(splice_cuda, "_module", None)
    plan = SimpleNamespace(image_rows=torch.empty(0), src=torch.empty(1).expand(2**31))
    table = torch.empty(4, 0)
    with pytest.raises(ValueError, match=r"splice_forward counts .* in 32 bits, and was given \[2147483648\]"):
        splice_cuda.forward(torch.empty(0, 8), torch.empty(0, 8), None, table, plan)


def test_nothing_to_do_launches_nothing(monkeypatch):
    monkeypatch.setattr(splice_cuda, "_module", None)
    _, plan = make_inputs(LAYOUTS[2]._replace(num_rows=0), torch.float32, torch.Generator())
    features, weight, table = torch.empty(0, 8), torch.empty(0, 8), torch.empty(5, 0)
    assert splice_cuda.forward(features, weight, None, table, plan).shape == (0, 0)
    grads = splice_cuda.backward(torch.empty(0, 0), features, weight, 5, plan, Needs(True, True, True, True))
    assert [list(grad.shape) for grad in grads] == [[0, 8], [0, 8], [0], [5, 0]]


class TestWhyNotFused:
    @pytest.fixture(autouse=True)
    def _device(self, monkeypatch):
        splice_cuda._why_it_fails.cache_clear()
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(splice_cuda, "check_implementation", lambda implementation, device, dtype: None)
        yield
        splice_cuda._why_it_fails.cache_clear()

    def why(self, dtype=torch.bfloat16, device="cuda"):
        return splice_cuda.why_not_fused(torch.device(device), dtype)

    def test_it_checks_itself_once_for_a_device(self, monkeypatch):
        calls = []
        monkeypatch.setattr(splice_cuda, "check_implementation", lambda *arguments: calls.append(arguments))
        assert self.why() is None and self.why(device="cuda:3") is None
        assert calls == [(splice_cuda, torch.device("cuda", 3), torch.bfloat16)]

    def test_reasons(self, monkeypatch):
        assert self.why(torch.float64) == "it computes in fp32, fp16 and bf16 only, and the model is in float64"
        assert self.why(device="cpu") == "no CUDA device"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert self.why() == "it needs compute capability 8.0, and the device has 7.5"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert self.why() == "no CUDA device"
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert self.why() == "it is a CUDA kernel, and this PyTorch is built for ROCm"

    def test_a_failed_check_is_the_reason(self, monkeypatch):
        monkeypatch.setattr(splice_cuda, "check_implementation", lambda *_: "its check fails")
        assert self.why() == "its check fails"

    def test_a_kernel_that_cannot_be_compiled_is_the_first_line_of_the_log(self, monkeypatch, tmp_path):
        try:
            kernel_build.choose_target((9, 0))
        except kernel_build.BackendUnavailableError as error:
            pytest.skip(str(error))
        monkeypatch.setattr(splice_cuda, "check_implementation", check_implementation)
        monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path))
        monkeypatch.setattr(kernel_build, "read_source", lambda name: b"__device__ int a = b;\n__device__ int c = d;")
        monkeypatch.setattr(splice_check.Inputs, "to", lambda self, device, *rest: self)
        monkeypatch.setattr(splice_check.RowPlan, "to", lambda self, device: self)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
        splice_cuda._module.cache_clear()
        assert self.why() == 'NVRTC cannot compile for sm_90: kernel.cu(1): error: identifier "b" is undefined'

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("no memory left\nmore"), ValueError("no memory left"), AttributeError()]
    )
    def test_an_error_that_leaves_the_device_usable_is_the_reason(self, monkeypatch, error):
        def fails(*_):
            raise error

        monkeypatch.setattr(splice_cuda, "check_implementation", fails)
        monkeypatch.setattr(splice_cuda, "_answers", lambda device: True)
        what = "no memory left" if str(error) else "no reason"
        assert self.why() == f"its check ended in {type(error).__name__}: {what}"

    def test_a_device_that_fails_stops_the_run(self, monkeypatch):
        def lost(*_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        monkeypatch.setattr(splice_cuda, "check_implementation", lost)
        with pytest.raises(RuntimeError, match=r"cuda:3 unusable: .*illegal memory access.*\n.*model.splice=library"):
            self.why()
