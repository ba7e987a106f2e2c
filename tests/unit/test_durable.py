"""A file holds the old text or the new one, whatever text that is and however its writing ends."""

import json

import pytest

from llava_ds.durable import replace_file, replacing


def test_the_new_text_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    file = tmp_path / "a.txt"
    replace_file(file, "old")
    with replacing(file) as new:
        new.write("né")
        assert file.read_text() == "old"
    assert file.read_bytes() == "né".encode()
    with pytest.raises(OSError, match="full"), replacing(file) as new:
        new.write("half")
        raise OSError("the disk is full")
    assert file.read_bytes() == "né".encode() and list(tmp_path.iterdir()) == [file]


def test_half_a_surrogate_pair_stands_in_json_as_its_escape(tmp_path):
    file = tmp_path / "a.json"
    replace_file(file, json.dumps(["\ud83d é"], ensure_ascii=False))
    assert json.loads(file.read_text(encoding="utf-8")) == ["\ud83d é"] and "é" in file.read_text(encoding="utf-8")
