"""Nothing is predicted across the border of two samples."""

import pytest
import torch

from llava_ds.constants import IGNORE_INDEX
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
