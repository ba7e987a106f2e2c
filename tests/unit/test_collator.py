"""Nothing is predicted across the border of two samples, and a batch moves as a whole, its row plan included."""

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from llava_ds.constants import IGNORE_INDEX, IMAGE_ROW, IMAGE_TOKEN_INDEX, PAD_ROW
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example
from llava_ds.schema import EncodedSample

# The first token of the last two is supervised: nothing may predict it.
SAMPLES = [
    ((1, 10, 11), (IGNORE_INDEX, 10, 11)),
    ((20, 21, 22, 23), (20, IGNORE_INDEX, 22, 23)),
    ((30, 31), (30, 31)),
]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_first_token_of_a_sample_is_predicted_by_nothing(packing):
    examples = [Example(EncodedSample(str(i), (), ids, labels)) for i, (ids, labels) in enumerate(SAMPLES)]
    batch = Collator(packing, torch.zeros(3, 4, 4), features=False)(examples)
    predicting = batch.input_ids.flatten()[batch.loss_rows].tolist()
    assert list(zip(predicting, batch.loss_labels.tolist(), strict=True)) == [
        (1, 10), (10, 11), (21, 22), (22, 23), (30, 31),
    ]
    assert batch.num_supervised == 5


PICTURED = [((4, *[IMAGE_TOKEN_INDEX] * 3, 5), 1), ((6, 4), 0)]


def _pictured(packing: str):
    examples = [
        Example(EncodedSample(str(i), ("x",) * count, ids, (IGNORE_INDEX,) * len(ids)), [torch.zeros(3, 4, 4)] * count)
        for i, (ids, count) in enumerate(PICTURED)
    ]
    return Collator(packing, torch.zeros(3, 4, 4), features=False)(examples)


@pytest.mark.parametrize(
    ("packing", "src", "token_rows"),
    [
        ("packed", [4, IMAGE_ROW, IMAGE_ROW, IMAGE_ROW, 5, 6, 4], [0, 6, 4, 5]),
        ("padded", [4, IMAGE_ROW, IMAGE_ROW, IMAGE_ROW, 5, 6, 4, PAD_ROW, PAD_ROW, PAD_ROW], [0, 6, 4, 5]),
    ],
)
def test_the_row_plan_says_where_every_row_comes_from(packing, src, token_rows):
    plan = _pictured(packing).row_plan
    assert plan.src.tolist() == src
    assert plan.image_rows.tolist() == [1, 2, 3]
    assert plan.token_ids.tolist() == [4, 5, 6]
    assert plan.token_starts.tolist() == [0, 2, 3, 4]
    assert plan.token_rows.tolist() == token_rows


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_an_empty_batch_has_a_row_of_a_token(packing):
    batch = Collator(packing, torch.zeros(3, 4, 4), features=False, pad_id=2)([])
    assert batch.row_plan.src.tolist() == batch.row_plan.token_ids.tolist() == [2]
    assert batch.row_plan.image_rows.tolist() == []


def _tensors(batch) -> dict[str, torch.Tensor]:
    everything = {**vars(batch), **vars(batch.row_plan)}
    return {name: value for name, value in everything.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("move", [lambda batch: batch.to(torch.device("meta")), pin_memory], ids=["to", "DataLoader"])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_batch_moves_with_every_tensor(packing, move, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # which needs a GPU
    batch = _pictured(packing)
    moved = move(batch)
    assert type(moved) is type(batch)
    assert _tensors(moved).keys() == _tensors(batch).keys()
    assert len(_tensors(moved)) == 11  # five of them of the row plan
    assert {tensor.device.type for tensor in _tensors(batch).values()} == {"cpu"}
    assert {tensor.device.type for tensor in _tensors(moved).values()} == {"meta"}
    assert (moved.sample_ids, moved.max_seqlen) == (batch.sample_ids, batch.max_seqlen)
