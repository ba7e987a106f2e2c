"""LLaVA JSON and JSONL: records become samples, bad ones are refused with their place."""

import json
from pathlib import Path

import pytest

from llava_ds.data.sources.formats import open_source
from llava_ds.data.sources.llava_json import open_llava_json
from llava_ds.errors import DataError
from llava_ds.schema import Sample, Turn

GOOD = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
TURNS = (Turn("user", "Hi"), Turn("assistant", "Ho"))


def _write(tmp_path, value) -> Path:
    path = tmp_path / "train.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def _read(path: Path) -> list[Sample]:
    return list(open_llava_json(path, path.parent))


@pytest.mark.parametrize(
    ("image", "names"),
    [(None, []), ("", []), ([], []), ("x.png", ["x.png"]), (["x.png", "b/y.png"], ["x.png", "b/y.png"])],
)
def test_a_record_becomes_a_sample(tmp_path, image, names):
    (sample,) = _read(_write(tmp_path, [GOOD | {"image": image}]))
    assert sample == Sample("a", tuple(str(tmp_path / name) for name in names), TURNS, "train.json[0]")


def test_json_and_jsonl_give_the_same_samples(tmp_path):
    records = [GOOD | {"id": n, "image": ["x.png"] * (n % 3)} for n in range(7)]
    (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    one, other = _read(_write(tmp_path, records)), open_source(str(tmp_path / "train.jsonl"))
    assert len(one) == len(other) == 7
    for number, sample in enumerate(one):
        assert other[number].origin == f"train.jsonl:{2 * number + 1}"
        assert (sample.id, sample.images, sample.turns) == (str(number), other[number].images, other[number].turns)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{]", r"train.json:1:3: not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected a list of records, got an empty list"),
        ("7", "expected a list of records, got int"),
        ([7], r"train.json\[0\]: expected an object, got int"),
        ([GOOD, {"conversations": []}], r"train.json\[1\]: no 'id'"),
        ([GOOD | {"id": None}], r"train.json\[0\]: 'id' must be text or a number, got None"),
        ([{"id": 3, "conversations": None}], r"train.json\[0\] id='3': 'conversations' must be a list"),
        ([{"id": "c", "conversations": []}], r"train.json\[0\] id='c': 'conversations' is empty"),
        ([GOOD | {"image": 3}], "'image' must be a path or a list"),
        ([GOOD | {"image": ["a.png", ""]}], "'image' must be a path or a list"),
        ([GOOD | {"image": False}], "'image' must be a path or a list"),
        ([{"id": "b", "conversations": [{"from": "bot", "value": ""}]}], "turn 0: unknown role 'bot'"),
        ([GOOD | {"id": "\ud800"}], "not Unicode text"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        _read(_write(tmp_path, value))


def test_a_bad_record_does_not_hide_the_others(tmp_path):
    source = open_llava_json(_write(tmp_path, [GOOD, 7, GOOD | {"id": "b"}]), tmp_path)
    with pytest.raises(DataError, match=r"\[1\]"):
        source[1]
    assert (source[0].id, source[2].id) == ("a", "b")


def test_an_error_knows_the_id_of_its_record(tmp_path):
    with pytest.raises(DataError) as caught:
        _read(_write(tmp_path, [GOOD | {"id": "c7", "image": 3}]))
    assert (caught.value.sample_id, caught.value.reason) == ("c7", "'image' is no path or list")


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        _read(tmp_path / "none.json")
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(str(tmp_path / "none.json"))
