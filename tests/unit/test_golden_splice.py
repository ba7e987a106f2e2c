"""Collator and splice together give the embeddings, labels and gradients of the official code's own splice.

Its inputs hold one token an image; ours come from ``encode`` with the image's patches in their places.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_ds.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example
from llava_ds.ops.project_splice import project_splice
from llava_ds.ops.row_plan import plan_rows
from llava_ds.schema import EncodedSample

FOLDER = Path(os.environ.get("LLAVA_DS_GOLDEN", "nowhere")) / "splice"
CASES = ["basic_right", "left_pad_out", "mixed_text_row", "all_text", "multi_image_row", "adjacent_images",
         "only_image", "truncate_text", "no_labels", "zero_length_row"]
NUM_PATCHES = 9
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="LLAVA_DS_GOLDEN names no folder with the golden files")


def test_every_case_is_here():
    assert [case["case"] for case in json.loads((FOLDER / "index.json").read_text())["cases"]] == CASES


def _examples(golden) -> list[Example]:
    """One example a row: padding taken away, every image token widened to its patches."""
    ids = golden["in_input_ids"]
    mask = golden["in_attention_mask"] if "in_attention_mask" in golden else np.ones_like(ids, dtype=bool)
    labels = golden["in_labels"] if "in_labels" in golden else np.full_like(ids, IGNORE_INDEX)
    features = iter(torch.from_numpy(golden["in_feats"]))
    examples = []
    for row, keep in enumerate(mask.astype(bool)):
        widths = [NUM_PATCHES if i == IMAGE_TOKEN_INDEX else 1 for i in ids[row][keep]]
        wide_ids, wide_labels = np.repeat(ids[row][keep], widths), np.repeat(labels[row][keep], widths)
        wide_labels[wide_ids == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
        num_images = widths.count(NUM_PATCHES)
        images = [next(features) for _ in range(num_images)]
        if not num_images:
            next(features)  # the official code spends one on a row of text
        encoded = EncodedSample(str(row), ("x",) * num_images, tuple(wide_ids.tolist()), tuple(wide_labels.tolist()))
        examples.append(Example(encoded, images))
    return examples


@pytest.mark.parametrize("case", CASES)
def test_splice_is_the_official_one(case):
    golden = dict(np.load(FOLDER / f"splice_{case}.npz"))
    examples = _examples(golden)
    table = torch.from_numpy(golden["in_embed"]).requires_grad_()
    width = table.shape[1]
    batch = Collator("padded", torch.zeros(NUM_PATCHES, width), features=True)(examples)
    features = batch.patch_features.clone().requires_grad_()
    plan = plan_rows(batch.input_ids, batch.attention_mask)
    # The features are as wide as the table already; a product with the identity changes no bit of them.
    embeds = project_splice(features, torch.eye(width), None, table, plan).view(*batch.input_ids.shape, width)

    official = torch.from_numpy(golden["out_embeds"])
    weights = torch.from_numpy(golden["in_R"])
    pads_left = case == "left_pad_out"
    total, num_compared = torch.zeros(()), 0
    for row, example in enumerate(examples):
        length = min(len(example.encoded.input_ids), official.shape[1])  # "truncate_text" is cut after the splice
        place = slice(official.shape[1] - length, None) if pads_left else slice(0, length)
        assert torch.equal(embeds[row, :length], official[row, place]), row
        if "out_labels" in golden:
            assert list(example.encoded.labels[:length]) == golden["out_labels"][row, place].tolist()
        total = total + (embeds[row, :length] * weights[row, place]).sum()
        num_compared += length
    assert num_compared > 8
    total.backward()
    # Sums of fp32 products in another order: 1e-6 was measured, a lost position gives 1e-1 and more.
    assert torch.allclose(table.grad, torch.from_numpy(golden["grad_embed"]), atol=1e-5)
    expected = torch.from_numpy(golden["grad_feats"])
    used = [n for n, gradient in enumerate(expected) if gradient.abs().sum() > 0]
    found = features.grad[features.grad.abs().sum((1, 2)) > 0]
    assert torch.allclose(found, expected[used], atol=1e-5)
