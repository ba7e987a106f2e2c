"""Folders of ``datasets.save_to_disk``: every kind of column becomes the same samples; images stay encoded."""

import io
import json
import multiprocessing
import pickle
import random
import shutil
from collections import Counter

import PIL.Image
import pytest

from llava_ds.data.sources.hf_datasets import open_hf_dataset
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Sample, StoredImage, Turn
from llava_ds.text.instructions import BRIEF_INSTRUCTIONS, draw_instruction

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

CHAT = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}]
TURNS = (Turn("user", "<image>\nHi"), Turn("assistant", "Ho"))


def _png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (3, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def _save(folder, columns, features=None):
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return folder


def _image_features(**others):
    return datasets.Features(
        {name: datasets.Value(kind) for name, kind in others.items()} | {"image": datasets.Image()}
    )


def test_conversations_with_paths(tmp_path):
    folder = _save(tmp_path / "set", {"id": ["a", "b"], "image": ["x.png", None], "conversations": [CHAT, CHAT]})
    wanted = [Sample("a", ("/img/x.png",), TURNS, "set[0]"), Sample("b", (), TURNS, "set[1]")]
    assert list(open_hf_dataset(folder, tmp_path / "/img", None)) == wanted
    assert open_hf_dataset(folder, None, None)[0].images == (str(folder / "x.png"),)


def test_lists_of_paths_and_numbers_as_ids(tmp_path):
    folder = _save(tmp_path / "set", {"id": [7, None], "images": [["x.png", "y.png"], []], "conversations": [CHAT] * 2})
    source = open_hf_dataset(folder, tmp_path, None)
    assert [(s.id, s.images) for s in source] == [("7", (str(tmp_path / "x.png"), str(tmp_path / "y.png"))), ("1", ())]


def test_the_image_feature_is_not_decoded(tmp_path):
    images = [{"bytes": _png(1), "path": "one.png"}, {"bytes": b"no picture", "path": None}]
    folder = _save(
        tmp_path / "set",
        {"id": ["a", "b"], "caption": ["One.", "Two."], "image": images},
        _image_features(id="string", caption="string"),
    )
    source = pickle.loads(pickle.dumps(open_hf_dataset(folder, None, None, seed=5)))
    samples = list(source)
    assert [image.name for sample in samples for image in sample.images] == ["set[0]:one.png", "set[1]:0"]
    assert [image.read() for sample in samples for image in sample.images] == [_png(1), b"no picture"]
    question = draw_instruction(BRIEF_INSTRUCTIONS, 5, "b")
    assert samples[1].turns == (Turn("user", f"<image>\n{question}"), Turn("assistant", "Two."))
    assert pickle.loads(pickle.dumps(samples[0].images[0])).read() == _png(1)


def test_lists_of_images_bytes_and_a_stored_path(tmp_path):
    text, content = datasets.Value("string"), datasets.Value("binary")
    features = datasets.Features(
        {
            "images": datasets.List({"bytes": content, "path": text}),  # as stored by Image, which would want y.png now
            "conversations": datasets.List({"from": text, "value": text}),
        }
    )
    images = [[{"bytes": _png(1), "path": None}, {"bytes": None, "path": "y.png"}], []]
    source = open_hf_dataset(
        _save(tmp_path / "a", {"images": images, "conversations": [CHAT] * 2}, features), tmp_path, None
    )
    first, second = source[0].images
    assert isinstance(first, StoredImage) and first.read() == _png(1)
    assert second == str(tmp_path / "y.png")
    assert source[1].images == ()
    source = open_hf_dataset(_save(tmp_path / "b", {"image": [b"raw"], "text": ["One."]}), None, None)
    assert (len(source), source[0].images[0].read()) == (1, b"raw")


def test_an_object_of_lists_is_a_conversation(tmp_path):
    turns = {"from": ["human", "gpt"], "value": ["<image>\nHi", "Ho"]}
    source = open_hf_dataset(
        _save(tmp_path / "set", {"conversations": [turns, {"from": ["human"], "value": []}]}), None, None
    )
    assert source[0].turns == TURNS
    with pytest.raises(DataError, match=r"set\[1\]: 'conversations' needs as many"):
        source[1]


def test_selected_and_shuffled_rows_keep_their_images(tmp_path):
    images = [{"bytes": _png(number), "path": None} for number in range(20)]
    rows = datasets.Dataset.from_dict(
        {"id": [str(n) for n in range(20)], "text": ["x"] * 20, "image": images},
        features=_image_features(id="string", text="string"),
    )
    rows.shuffle(seed=0).select(range(10)).save_to_disk(str(tmp_path / "set"), num_shards=3)
    source = open_hf_dataset(tmp_path / "set", None, None)
    assert len(source) == 10
    assert [sample.images[0].read() for sample in source] == [_png(int(sample.id)) for sample in source]


def test_fork(tmp_path):
    source = open_hf_dataset(_save(tmp_path / "set", {"id": ["a", "b", "c"], "conversations": [CHAT] * 3}), None, None)
    wanted = list(source)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(source.__getitem__, [0, 1, 2] * 20) == wanted * 20


def test_splits(tmp_path):
    part = datasets.Dataset.from_dict({"id": ["a"], "conversations": [CHAT]})
    datasets.DatasetDict({"train": part, "val": part}).save_to_disk(str(tmp_path / "two"))
    assert open_hf_dataset(tmp_path / "two", None, "val")[0].origin == "two/val[0]"
    with pytest.raises(ConfigError, match="choose a split: train, val"):
        open_hf_dataset(tmp_path / "two", None, None)
    with pytest.raises(ConfigError, match="no split 'dev'; it holds train, val"):
        open_hf_dataset(tmp_path / "two", None, "dev")
    datasets.DatasetDict({"train": part}).save_to_disk(str(tmp_path / "one"))
    assert len(open_hf_dataset(tmp_path / "one", None, None)) == 1
    part.save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="leave the split out"):
        open_hf_dataset(tmp_path / "none", None, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1]}, "needs 'conversations', or 'image' and 'caption'.*found x"),
        ({"caption": ["a"]}, "found caption"),
        ({"image": ["a"], "images": [["a"]], "conversations": [CHAT]}, "both 'image' and 'images'"),
        ({"conversations": []}, "no row"),
    ],
)
def test_wrong_columns(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        open_hf_dataset(_save(tmp_path / "set", columns), None, None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [None], "caption": ["a"]}, r"set\[0\]: a pair needs one image, got 0"),
        ({"image": [3], "caption": ["a"]}, r"set\[0\]: an image must be a path or bytes, got 3"),
        ({"image": ["a"], "caption": [""]}, r"set\[0\] id='0': no 'caption'"),
        ({"images": [[""]], "conversations": [CHAT]}, r"set\[0\]: image 0 has neither bytes nor a path"),
        ({"conversations": [None]}, r"set\[0\] id='0': 'conversations' must be a list"),
        ({"conversations": [["Hi"]]}, r"set\[0\] id='0' turn 0: expected"),
    ],
)
def test_bad_rows_are_named(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        open_hf_dataset(_save(tmp_path / "set", columns), None, None)[0]


def test_folders_that_are_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(DataError, match=f"{name}: not a folder of datasets.save_to_disk"):
            open_hf_dataset(tmp_path / name, None, None)


def test_the_fingerprint_follows_data_and_settings(tmp_path):
    folder = _save(tmp_path / "a", {"id": ["a"], "conversations": [CHAT]})
    prints = [open_hf_dataset(folder, None, None).fingerprint for _ in range(2)]
    assert len(set(prints)) == 1
    prints.append(open_hf_dataset(folder, tmp_path, None).fingerprint)
    prints.append(
        open_hf_dataset(_save(tmp_path / "b", {"id": ["b"], "conversations": [CHAT]}), None, None).fingerprint
    )
    assert len(set(prints)) == 3


def test_mutated_folders_give_samples_or_data_errors(tmp_path):
    images = [{"bytes": _png(number), "path": "x.png"} for number in range(4)]
    good = _save(tmp_path / "set", {"caption": ["A cat."] * 4, "image": images}, _image_features(caption="string"))
    rng = random.Random(0)
    outcomes = Counter()
    for trial in range(200):
        folder = tmp_path / str(trial)
        shutil.copytree(good, folder)
        file = rng.choice([folder / "data-00000-of-00001.arrow", *sorted(folder.iterdir())])
        content = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        file.write_bytes(content)
        try:
            source = open_hf_dataset(folder, None, None)
            for number in range(min(len(source), 4)):
                try:
                    sample = source[number]
                    assert isinstance(sample, Sample)
                    outcomes["good"] += all(
                        isinstance(i.read(), bytes) for i in sample.images if isinstance(i, StoredImage)
                    )
                except DataError:
                    outcomes["bad row"] += 1
        except DataError:
            outcomes["bad folder"] += 1
        shutil.rmtree(folder)
    assert outcomes["good"] > 50
    assert outcomes["bad folder"] > 20
    assert json.loads((good / "state.json").read_text())
