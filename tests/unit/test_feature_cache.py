"""The cache gives exactly the tower's features, and computes each picture once."""

import os

import pytest
import torch

from llava_ds.data.feature_cache import open_feature_cache
from llava_ds.errors import DataError


def _files(folder, names):
    paths = []
    for name in names:
        path = folder / name
        path.write_text(name)
        paths.append(path)
    return paths


def test_each_picture_is_computed_once_and_again_when_it_changes(tmp_path):
    computed = []

    def compute(images):
        computed.extend(path.name for path in images)
        return torch.stack([torch.full((3, 2), float(len(path.read_text()))) for path in images])

    a, bb, ccc = _files(tmp_path, ["a", "bb", "ccc"])
    cache = tmp_path / "cache"
    first = open_feature_cache(cache, [a, bb], (3, 2), compute, batch_size=1)
    assert torch.equal(first(bb), torch.full((3, 2), 2.0))
    with (cache / "features.f32").open("ab") as file:
        file.write(b"interrupted")
    second = open_feature_cache(cache, [a, bb, ccc], (3, 2), compute)
    assert torch.equal(second(ccc), torch.full((3, 2), 3.0))
    assert torch.equal(second(a), torch.ones(3, 2))
    a.write_text("longer")
    os.utime(a, ns=(1, 1))
    third = open_feature_cache(cache, [a], (3, 2), compute)
    assert torch.equal(third(a), torch.full((3, 2), 6.0))
    assert computed == ["a", "bb", "ccc", "a"]
    with pytest.raises(DataError, match="is not in the feature cache"):
        third(bb)
