"""Lengths are measured once, in any number of processes, and again when anything changes that they depend on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_ds.data import lengths as lengths_module
from llava_ds.data.length_table import ROW, LengthTable, join_lengths
from llava_ds.data.lengths import measure_source
from llava_ds.data.sources.formats import open_source
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError
from llava_ds.models.build import load_tokenizer
from tests.helpers.tiny import write_llm

NUM = 1203  # above what is measured without a cache, and no multiple of a chunk


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(write_llm(tmp_path_factory.mktemp("lengths") / "llm")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _write(folder: Path, num: int = NUM) -> str:
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    with (folder / "train.jsonl").open("w") as file:
        for number in range(num):
            turns = [{"from": "human", "value": "What is this? " * (1 + number % 5)},
                     {"from": "gpt", "value": "a red fox " * (1 + number % 7)}]
            record = {"id": number, "conversations": turns}
            if number % 3:
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
                record["image"] = "a.png"
            file.write(json.dumps(record) + "\n")
    return str(folder / "train.jsonl")


def _text(tokenizer, **changes) -> TextPipeline:
    settings = {"template": "short", "placement": "random", "num_patches": 9, "max_length": 200, "seed": 3}
    return TextPipeline(tokenizer, **settings | changes)


def _measure(path: str, text: TextPipeline, **options) -> tuple[LengthTable, list[str]]:
    said: list[str] = []
    on_bad_sample = options.pop("on_bad_sample", "error")
    return measure_source(open_source(path), text, on_bad_sample, log=said.append, **options), said


def test_one_process_and_three_give_the_lengths_of_every_record(folder, tokenizer):
    path, text = _write(folder), _text(tokenizer)
    one, _ = _measure(path, text, num_processes=1)
    for kept in (folder / "cache" / "lengths").iterdir():
        kept.unlink()
    three, said = _measure(path, text, num_processes=3)
    assert said == [f"train.jsonl: measuring {NUM} records with 3 process(es), once"]
    assert (one.rows == three.rows).all()
    source = open_source(path)
    for index in (0, 1, 2, 511, 512, NUM - 1):
        pair = text.encode_orders(source[index])
        assert one.rows["num_tokens"][index].tolist() == [len(e.input_ids) for e in pair]
        assert one.rows["num_supervised"][index].tolist() == [e.num_supervised for e in pair]
    passes = np.arange(40)
    tokens = one.tokens(np.full(40, 1), passes)
    assert tokens.tolist() == [len(text.encode(source[1], int(p)).input_ids) for p in passes]


def test_kept_lengths_are_found_again_and_only_for_the_same_settings(folder, tokenizer):
    path = _write(folder)
    assert len(_measure(path, _text(tokenizer))[1]) == 1
    assert _measure(path, _text(tokenizer))[1] == []
    assert _measure(path, _text(tokenizer, seed=4))[1] == []  # the seed chooses among the kept lengths
    for change in ({"template": "v1"}, {"placement": "front"}, {"num_patches": 8}, {"max_length": 199},
                   {"truncation": "none"}):
        assert len(_measure(path, _text(tokenizer, **change))[1]) == 1, change
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"id": "new", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n')
    lengths, said = _measure(path, _text(tokenizer))
    assert (len(lengths), len(said)) == (NUM + 1, 1)


@pytest.mark.parametrize("damage", [b"", b"garbage", "cut", "flipped"])
def test_damaged_lengths_are_measured_again(folder, tokenizer, damage):
    path, text = _write(folder), _text(tokenizer)
    expected, _ = _measure(path, text)
    (kept,) = (folder / "cache" / "lengths").glob("*.npy")
    whole = kept.read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    kept.write_bytes({"cut": whole[:-50], "flipped": flipped}.get(damage, damage))
    again, said = _measure(path, text)
    assert len(said) == 1
    assert (again.rows == expected.rows).all()
    assert _measure(path, text)[1] == []


def test_pictures_that_were_missing_are_looked_for_again(folder, tokenizer):
    path, text = _write(folder), _text(tokenizer)
    (folder / "a.png").rename(folder / "b.png")
    with pytest.raises(DataError, match=f"(?s)802 of {NUM} records are bad.*train.jsonl:2 id='1': image .*a.png"):
        _measure(path, text)
    lengths, _ = _measure(path, text, on_bad_sample="skip")
    assert dict(lengths.skipped()) == {"image file is missing": 802}
    (folder / "b.png").rename(folder / "a.png")
    lengths, said = _measure(path, text, on_bad_sample="skip")
    assert said == ["train.jsonl: measuring 802 records with 2 process(es), once"]
    assert not lengths.skipped() and len(lengths.good()) == NUM
    assert not _measure(path, text)[0].skipped()


def test_a_process_that_is_killed_is_an_error(folder, tokenizer, monkeypatch):
    path = _write(folder)
    monkeypatch.setattr(lengths_module, "sample_key", lambda _: os._exit(9))
    with pytest.raises(DataError, match="was killed"):
        _measure(path, _text(tokenizer), num_processes=2)


def test_tables_are_joined_with_their_reasons(folder, tokenizer):
    rows = np.zeros(5, ROW)
    rows["reason"] = [-1, 0, 1, 1, -1]
    first = LengthTable(rows, ("a", "b"), False, 0)
    other = LengthTable(rows[1:3].copy(), ("b", "c"), False, 0)
    joined = join_lengths([first, other])
    assert dict(joined.skipped()) == {"a": 1, "b": 3, "c": 1}
    assert joined.good().tolist() == [0, 4]
    assert dict(first.skipped()) == {"a": 1, "b": 2}
