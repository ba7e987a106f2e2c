"""The plan of the rows against a slow one that reads the ids one by one."""

import random

import pytest
import torch

from llava_ds.constants import IMAGE_ROW, IMAGE_TOKEN_INDEX, PAD_ROW
from llava_ds.ops.row_plan import plan_rows
from llava_ds.schema import RowPlan


def _plan_reference(ids: list[list[int]], mask: list[list[bool]]) -> dict[str, list[int]]:
    flat = [(token, keep) for row, kept in zip(ids, mask, strict=True) for token, keep in zip(row, kept, strict=True)]
    src = [PAD_ROW if not keep else IMAGE_ROW if token == IMAGE_TOKEN_INDEX else token for token, keep in flat]
    rows_of: dict[int, list[int]] = {}
    for row, token in enumerate(src):
        rows_of.setdefault(token, []).append(row)
    token_ids = sorted(token for token in rows_of if token >= 0)
    token_starts, token_rows = [0], []
    for token in token_ids:
        token_rows += rows_of[token]
        token_starts.append(len(token_rows))
    return {"src": src, "image_rows": rows_of.get(IMAGE_ROW, []), "token_ids": token_ids,
            "token_starts": token_starts, "token_rows": token_rows}


def _lists(plan: RowPlan) -> dict[str, list[int]]:
    assert all(part.dtype == torch.int64 and part.is_contiguous() for part in vars(plan).values())
    return {name: part.tolist() for name, part in vars(plan).items()}


def test_random_layouts():
    draw, seen = random.Random(0), {"images": 0, "pads": 0, "repeated": 0}
    for _ in range(300):
        num_rows, length, vocabulary = draw.randint(1, 4), draw.randint(1, 40), draw.choice([1, 3, 20, 30000])
        tokens = [*range(vocabulary)] if draw.random() < 0.3 else [IMAGE_TOKEN_INDEX, *range(vocabulary)]
        ids = [draw.choices(tokens, k=length) for _ in range(num_rows)]
        mask = [[token == IMAGE_TOKEN_INDEX or draw.random() < 0.8 for token in row] for row in ids]
        plan = _lists(plan_rows(torch.tensor(ids), torch.tensor(mask)))
        assert plan == _plan_reference(ids, mask)
        seen["images"] += len(plan["image_rows"])
        seen["pads"] += plan["src"].count(PAD_ROW)
        seen["repeated"] += len(plan["token_rows"]) - len(plan["token_ids"])
    assert min(seen.values()) > 1000, seen


IMAGE = IMAGE_TOKEN_INDEX
CASES = {
    "nothing": ([[]], [[]]),
    "no row": ([], []),
    "only pads": ([[0, 0, 7]], [[False] * 3]),
    "only images": ([[IMAGE, IMAGE], [IMAGE, IMAGE]], [[True] * 2] * 2),
    "only text": ([[5, 5, 4]], [[True] * 3]),
    "id 0 is a token beside pads of id 0": ([[0, 3, 0, 0], [0, 0, 0, 3]], [[True] * 3 + [False], [False] + [True] * 3]),
    "a negative id outside the mask is padding": ([[-1, -2, -100, 2]], [[False] * 3 + [True]]),
}


@pytest.mark.parametrize("case", CASES)
def test_odd_cases(case):
    ids, mask = CASES[case]
    plan = plan_rows(torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.bool))
    assert _lists(plan) == _plan_reference(ids, mask)


def test_without_a_mask_nothing_is_padding_and_the_ids_stay():
    ids = torch.tensor([[0, IMAGE, 0, 4, IMAGE]])
    before = ids.clone()
    plan = plan_rows(ids)
    assert torch.equal(ids, before)
    assert plan.src.tolist() == [0, IMAGE_ROW, 0, 4, IMAGE_ROW]
    assert plan.image_rows.tolist() == [1, 4]


def test_a_mask_of_numbers_and_a_transposed_one_say_the_same():
    ids = torch.tensor([[1, IMAGE, 2], [3, 4, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    expected = _lists(plan_rows(ids, mask))
    assert _lists(plan_rows(ids, mask.long())) == expected
    assert _lists(plan_rows(ids.T.contiguous().T, mask.T.contiguous().T)) == expected


@pytest.mark.parametrize("token", [-1, -2, -100])
def test_an_id_that_is_no_token_is_refused(token):
    with pytest.raises(ValueError, match=f"id {token} in row 1, column 2 is neither a token nor -200"):
        plan_rows(torch.tensor([[1, 2, 3, 4], [1, IMAGE, token, 3]]))


def test_an_image_outside_the_mask_is_refused():
    """Its patches would go to the next image's rows."""
    with pytest.raises(ValueError, match="id -200 in row 0, column 1 is a patch outside the mask"):
        plan_rows(torch.tensor([[IMAGE, IMAGE, 2]]), torch.tensor([[True, False, True]]))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 3\].*\[1, 2\]"):
        plan_rows(torch.tensor([[1, 2, 3]]), torch.tensor([[True, True]]))


def test_every_tensor_is_moved_and_pinned(monkeypatch):
    plan = plan_rows(torch.tensor([[1, IMAGE, 1]]))
    moved = plan.to(torch.device("meta"))
    assert isinstance(moved, RowPlan)
    assert [(part.device.type, part.shape) for part in vars(moved).values()] == [
        ("meta", part.shape) for part in vars(plan).values()
    ]
    # Page-locked memory needs a GPU: which tensors are asked to move into it is seen without one.
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    assert _lists(plan.pin_memory()) == _lists(plan)
    assert [id(part) for part in pinned] == [id(part) for part in vars(plan).values()]
