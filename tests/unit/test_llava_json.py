"""Bad records are refused with their place, or skipped and counted."""

import json

import pytest

from llava_ds.data.llava_json import read_llava_json
from llava_ds.errors import DataError

GOOD = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}


def _write(tmp_path, value):
    path = tmp_path / "train.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_record_becomes_a_sample(tmp_path):
    samples, skipped = read_llava_json(_write(tmp_path, [GOOD | {"image": "x.png"}]))
    assert [(s.id, s.images, [t.role for t in s.turns]) for s in samples] == [("a", ("x.png",), ["user", "assistant"])]
    assert not skipped


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{]", r"train.json:1:3: not valid JSON"),
        ("[]", "expected a list of records, got an empty list"),
        ("7", "expected a list of records, got int"),
        ([7], r"train.json\[0\]: expected an object, got int"),
        ([GOOD, {"conversations": []}], r"train.json\[1\]: no 'id'"),
        ([{"id": 3, "conversations": None}], r"train.json\[0\] id='3': 'conversations' must be a list"),
        ([{"id": "c", "conversations": []}], r"train.json\[0\] id='c': 'conversations' is empty"),
        ([GOOD | {"image": 3}], "'image' must be a path or a list"),
        ([{"id": "b", "conversations": [{"from": "bot", "value": ""}]}], "turn 0: unknown role 'bot'"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        read_llava_json(_write(tmp_path, value))


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_llava_json(tmp_path / "none.json")


def test_skipped_records_are_counted_by_reason(tmp_path):
    samples, skipped = read_llava_json(_write(tmp_path, [GOOD, 7, 8]), on_bad_sample="skip")
    assert len(samples) == 1
    assert dict(skipped) == {"not an object": 2}
