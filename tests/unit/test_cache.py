"""A folder of the cache is built once, and is there whole or not at all."""

import pytest

from llava_ds.cache import build_once
from llava_ds.constants import COMPLETE_MARKER


def test_a_folder_is_built_once(tmp_path):
    target, calls = tmp_path / "deep" / "folder", []

    def fill(work):
        calls.append(work)
        (work / "data").write_text(f"build {len(calls)}")

    build_once(target, fill)
    build_once(target, fill)
    assert len(calls) == 1 and sorted(file.name for file in target.iterdir()) == [COMPLETE_MARKER, "data"]
    (target / COMPLETE_MARKER).unlink()
    (target / "left").write_text("of a build that was cut off")
    build_once(target, fill)
    assert (target / "data").read_text() == "build 2" and not (target / "left").exists()
    assert [entry.name for entry in target.parent.iterdir()] == ["folder"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fill(work):
        (work / "half").write_text("")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        build_once(tmp_path / "folder", fill)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path):
    target = tmp_path / "folder"

    def fill(work):
        build_once(target, lambda other: (other / "theirs").write_text(""))
        work.mkdir(exist_ok=True)
        (work / "ours").write_text("")

    build_once(target, fill)
    assert (target / "theirs").exists() and not (target / "ours").exists()
