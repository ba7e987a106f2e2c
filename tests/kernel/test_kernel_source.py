"""The kernel's own source, run on the CPU: right in every dtype, form and layout, in whatever order its warps run."""

from functools import partial

import pytest
import torch

from llava_ds.constants import IMAGE_ROW
from llava_ds.ops import splice_check
from llava_ds.ops.row_plan import Needs
from tests.helpers.cuda_on_cpu.cases import (
    EDGES,
    Layout,
    check_layout,
    check_offsets,
    make_case,
    random_layouts,
    run,
)
from tests.helpers.cuda_on_cpu.runner import DTYPES, EmulatedSplice, KernelError, Program, needs_compiler

pytestmark = [pytest.mark.kernel, needs_compiler]

VARIANTS = [(dtype, vector) for dtype in DTYPES for vector in (False, True)]
NUM_RANDOM = 34
"""Layouts drawn for each variant, others for every one; the fixed ones come on top."""

every_variant = pytest.mark.parametrize(("dtype", "vector"), VARIANTS, ids=lambda part: str(part).split(".")[-1])


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Makes the emulated kernel of a form; each form is compiled once."""
    return partial(EmulatedSplice, tmp_path_factory.mktemp("kernel"))


@every_variant
def test_every_layout_is_right(kernel, dtype, vector):
    layouts = [*EDGES, *random_layouts(NUM_RANDOM, seed=VARIANTS.index((dtype, vector)))]
    assert NUM_RANDOM * len(VARIANTS) >= 200
    emulated = kernel(vector=vector)
    wrong = []
    for number, layout in enumerate(layouts):
        emulated.seed = number
        try:
            check_layout(emulated, layout, dtype, vector)
        except (AssertionError, KernelError) as error:
            wrong.append(f"{layout}: {error}")
    assert not wrong, "\n".join(wrong)


@every_variant
def test_the_order_of_warps_changes_no_bit(kernel, dtype, vector):
    layout = Layout("two tiles", "t40 i70 p3 t1 i66", 70, 137, 5, 2)
    case = make_case(layout, dtype, vector, integers=False)
    emulated = kernel(vector=vector)
    first = run(emulated, case)
    for emulated.seed in (1, 2, 3):
        for found, expected in zip(run(emulated, case), first, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_forms_give_the_same_bits(kernel, dtype):
    case = make_case(Layout("", "t20 i70 t3", 96, 136), dtype, True, integers=False)
    for found, expected in zip(run(kernel(vector=False), case), run(kernel(vector=True), case), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ldmatrix_has_no_bank_conflicts(kernel, dtype):
    """Both ways that tiles are stored: forward reads them by line, the gradient of the weight by k."""
    emulated = kernel(vector=True)
    run(emulated, make_case(Layout("", "i70 t2", 96, 136), dtype, True, integers=False))
    assert emulated.program(dtype, True).num_bank_conflicts() == 0


@pytest.mark.parametrize("vector", [False, True])
def test_offsets_have_more_than_32_bits(kernel, vector):
    check_offsets(kernel(), torch.bfloat16, vector)


def test_patches_in_any_order_of_rows(kernel):
    case = make_case(Layout("", "t3 i50 t2 i20", 24, 24), torch.bfloat16, True, integers=False)
    order = torch.randperm(len(case.plan.image_rows), generator=torch.Generator().manual_seed(0))
    expected = run(kernel(), case)[0]
    case.plan.image_rows.copy_(case.plan.image_rows[order])
    found = run(kernel(), case._replace(patch_features=case.patch_features[order]))[0]
    assert torch.equal(found, expected)


@every_variant
@pytest.mark.parametrize("token", [11, -3, 2**40, -(2**40)])
def test_a_row_that_names_no_token_traps(kernel, dtype, vector, token):
    case = make_case(Layout("", "t12 i3", vocabulary=11), dtype, vector, integers=True)
    case.plan.src[7] = token
    with pytest.raises(KernelError, match="trap"):
        kernel(vector=vector).forward(*case[:5])


@pytest.mark.parametrize("row", [15, -1, 2**40])
def test_a_patch_for_no_row_traps(kernel, row):
    case = make_case(Layout("", "t12 i3"), torch.float32, False, integers=True)
    case.plan.image_rows[1] = row
    with pytest.raises(KernelError, match="trap"):
        kernel(vector=False).forward(*case[:5])


def test_image_rows_stay_as_they_are_without_patches(kernel):
    """The text blocks leave rows of images alone: here nobody writes them."""
    case = make_case(Layout("", "t5 i3 p2"), torch.float32, False, integers=True)
    plan = case.plan
    assert (plan.src == IMAGE_ROW).sum() == 3
    no_patches = case._replace(plan=type(plan)(plan.src, plan.image_rows[:0], *list(vars(plan).values())[2:]))
    out = kernel(vector=False).forward(*no_patches[:5])
    assert out[5:8].isnan().all()
    assert not out[[0, 1, 2, 3, 4, 8, 9]].isnan().any()


@pytest.mark.parametrize("needed", range(4))
def test_a_gradient_that_is_not_needed_is_empty(kernel, needed):
    case = make_case(Layout("", "t5 i3"), torch.float32, False, integers=True)
    needs = Needs(*(part == needed for part in range(4)))
    found = kernel().backward(case.grad, case.patch_features, case.weight, case.table.shape[0], case.plan, needs)
    assert [part.numel() > 0 for part in found] == list(needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_that_devices_get_passes(kernel, dtype, monkeypatch):
    launched, launch = [], Program.launch

    def counted(self, entry, *arguments):
        launched.append(entry)
        launch(self, entry, *arguments)

    monkeypatch.setattr(Program, "launch", counted)
    assert splice_check.check_implementation(kernel(), torch.device("cpu"), dtype) is None
    assert len(launched) == 3 * (5 * len(splice_check.LAYOUTS) - 3), "all but no patch twice, no bias, no token"
    assert len(set(launched)) == 5
