"""The quickstart's preparation from pip packages alone: built once, found again, and nothing left of a failed one."""

import json
from collections import Counter

import pytest
from PIL import Image

from llava_ds.data.sources.llava_json import open_llava_json
from llava_ds.errors import ConfigError
from llava_ds.models.build import load_tokenizer
from llava_ds.quickstart import prepare as preparation
from llava_ds.text.encode import encode_sample
from llava_ds.text.templates import get_template

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LLAVA_DS_CACHE", str(folder))
    monkeypatch.setenv("LLAVA_DS_QUICKSTART_STYLES", "twemoji,openmoji")
    return folder


def test_pip_alone_is_enough(cache):
    lines = []
    folder = preparation.prepare(lines.append)
    assert "trained on twemoji; unseen: openmoji" in lines[-1]
    assert "fluent" in lines[-1] and "noto" in lines[-1]
    stage1 = list(open_llava_json(folder / "stage1.json", folder))
    stage2 = list(open_llava_json(folder / "stage2.json", folder))
    assert len({sample.id for sample in (*stage1, *stage2)}) == len(stage1) + len(stage2)
    assert Counter("scene" in sample.id for sample in stage2) == {False: len(stage1), True: preparation.NUM_SCENES}
    assert len(stage1) == 8 * 288
    for sample in (*stage1, *stage2):
        assert all("twemoji" in image for image in sample.images)
        assert Image.open(sample.images[0]).size == (preparation.IMAGE_SIZE,) * 2
    texts = list(open_llava_json(folder / "texts.json", folder))
    assert len(texts) == len(stage1) + len(stage2)
    assert not any(sample.images for sample in texts)
    questions = json.loads((folder / "eval.json").read_text())
    assert all("openmoji" in record["image"] for record in questions)
    tokenizer = load_tokenizer(str(folder / "llm"))
    assert all(encode_sample(s, tokenizer, get_template("short"), 36).num_supervised > 2 for s in stage2)
    boxes = [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]
    assert len(boxes) == preparation.NUM_SCENES
    assert all(0 <= edge <= 1 for line in boxes for thing in line["instances"] for edge in thing["bbox"])

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert preparation.prepare(lines.append) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_failed_preparation_leaves_nothing_that_looks_complete(cache, monkeypatch):
    monkeypatch.setattr(preparation, "_train_llm", lambda work: (_ for _ in ()).throw(ConfigError("no words")))
    with pytest.raises(ConfigError, match="no words"):
        preparation.prepare(lambda _: None)
    assert [path.name for path in cache.iterdir()] == ["downloads"]
