"""What a node says of itself: paths with cheap digests, places that were really written to, code, versions."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import pytest
import xxhash

from llava_ds.cluster import node_places
from llava_ds.cluster.node_paths import Need, list_needs, look_at_path
from llava_ds.cluster.node_places import list_places, look_at_place, nearest_folder
from llava_ds.cluster.node_report import NodeReport, hash_sources, look_at_node, node_name, resolve_if_prepared
from llava_ds.config import load_recipe, parse_config

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _config(data, **model):
    train = {"trainable": ["projector"], "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    raw = {
        "name": "r", "train": train, "data": {"template": "v1", "placement": "front", **data},
        "model": {"vision_tower": "ViT-L-14", "vision_pretrained": "openai", "llm": "lmsys/vicuna-7b-v1.5",
                  "projector": "linear", **model},
    }
    return parse_config(raw, "here")


def _look(path):
    return look_at_path(Need("data.path", str(path)))


def test_the_digest_of_a_file_is_of_its_size_and_ends(tmp_path):
    file = tmp_path / "f"
    content = bytearray(os.urandom(3 * MIB))
    file.write_bytes(content)
    report = _look(file)
    assert (report.path, report.kind, report.size_bytes) == (str(file), "file", 3 * MIB)
    expected = xxhash.xxh3_128(str(3 * MIB).encode() + b"\0" + content[:MIB] + content[-MIB:])
    assert report.digest == expected.hexdigest()
    for place, seen in ((0, True), (MIB - 1, True), (MIB, False), (2 * MIB, True), (3 * MIB - 1, True)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert (_look(file).digest != report.digest) == seen, place


@pytest.mark.parametrize("size", [0, 5, MIB, MIB + 7, 2 * MIB])
def test_a_small_file_is_read_whole_and_once(tmp_path, size):
    file = tmp_path / "f"
    content = os.urandom(size)
    file.write_bytes(content)
    assert _look(file).digest == xxhash.xxh3_128_hexdigest(str(size).encode() + b"\0" + content)


def test_the_digest_of_a_folder_is_of_names_and_sizes(tmp_path):
    def fill(folder, names):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"123")
        (folder / "inner").mkdir()
        return _look(folder)

    first = fill(tmp_path / "a", "xyz")
    assert (first.kind, first.num_entries, first.size_bytes) == ("folder", 4, 9)
    assert fill(tmp_path / "b", "zyx").digest == first.digest
    (tmp_path / "b" / ".nfs0001").write_text("hidden")
    (tmp_path / "b" / "inner" / "more").write_text("deeper")
    (tmp_path / "b" / "x").write_bytes(b"456")
    assert _look(tmp_path / "b").digest == first.digest
    (tmp_path / "b" / "x").write_bytes(b"4567")
    assert _look(tmp_path / "b").digest != first.digest
    assert fill(tmp_path / "c", "xyw").digest != first.digest


def test_beyond_ten_thousand_entries_only_their_number_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_ds.cluster.node_paths._MAX_ENTRIES", 3)
    for name in "abcd":
        (tmp_path / name).write_text(name)
    first = _look(tmp_path)
    assert (first.num_entries, first.size_bytes) == (4, 3)
    (tmp_path / "d").write_text("longer")
    assert _look(tmp_path).digest == first.digest
    (tmp_path / "e").write_text("e")
    assert _look(tmp_path).digest != first.digest


def test_what_is_missing_or_cannot_be_read_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert _look(tmp_path / "no").kind == "missing"
    assert _look(tmp_path / "file" / "below").kind == "missing"
    (tmp_path / "dangling").symlink_to(tmp_path / "no")
    assert _look(tmp_path / "dangling").kind == "missing"

    def stale(_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "listdir", stale)
    report = _look(tmp_path)
    assert (report.kind, report.error) == ("unreadable", "[Errno 116] Stale file handle")


def test_every_local_path_of_a_recipe_is_looked_at():
    needs, notes = list_needs(
        _config(
            {"path": "d.json", "image_root": "images", "feature_cache": "features"},
            vision_tower="/towers/a", vision_pretrained=None, llm="./llm", init_from="runs/one",
        )
    )
    assert notes == []
    assert [(need.setting, need.path, need.required, need.compared) for need in needs] == [
        ("data.path", "d.json", True, True),
        ("data.image_root", "images", True, True),
        ("data.feature_cache", "features", False, False),
        ("model.vision_tower", "/towers/a", True, True),
        ("model.llm", "./llm", True, True),
        ("model.init_from", "runs/one", True, True),
    ]


def test_names_may_be_paths_and_urls_are_left_out():
    mixture = [{"path": "s3://bucket/{000..009}.tar"}, {"path": "shards/{000..009}.tar", "image_root": "i"}]
    needs, _ = list_needs(_config({"mixture": mixture}))
    assert [(need.setting, need.path, need.required) for need in needs] == [
        ("data.mixture[1].path", "shards", True),
        ("data.mixture[1].image_root", "i", True),
        ("model.vision_tower", "ViT-L-14", False),
        ("model.vision_pretrained", "openai", False),
        ("model.llm", "lmsys/vicuna-7b-v1.5", False),
    ]


def test_what_is_not_prepared_yet_is_left_out_and_said(cache):
    config, notes = resolve_if_prepared(load_recipe("quickstart_stage1"))
    assert notes == [f"0 prepared folders quickstart-* in {cache}, so none was looked at"]
    needs, notes = list_needs(config)
    assert needs == []
    assert [note.split("=")[0] for note in notes] == [
        "data.path", "data.feature_cache", "model.vision_tower", "model.llm",
    ]


def test_a_prepared_folder_is_found_without_preparing(cache):
    for name in ("quickstart-1", "quickstart-2"):
        (cache / name).mkdir(parents=True)
    (cache / "quickstart-2" / "COMPLETE").touch()
    config, notes = resolve_if_prepared(load_recipe("quickstart_stage1"))
    assert (config.data.path, notes) == (f"{cache}/quickstart-2/stage1.json", [])
    (cache / "quickstart-1" / "COMPLETE").touch()
    config, notes = resolve_if_prepared(load_recipe("quickstart_stage1"))
    assert config.data.path == "{prepared}/stage1.json"
    assert notes == [f"2 prepared folders quickstart-* in {cache}, so none was looked at"]


def test_a_place_is_the_nearest_folder_and_was_written_to(tmp_path):
    place = look_at_place(tmp_path / "not" / "yet")
    assert (place.path, place.error) == (str(tmp_path), "")
    assert place.free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    assert nearest_folder(tmp_path) == tmp_path


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_place_that_cannot_be_written_says_why():
    place = look_at_place(Path("/proc/nothing"))
    assert place.path == "/proc"
    assert place.error.startswith("[Errno ")


def test_a_full_disk_is_found_by_writing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert look_at_place(tmp_path).error == "[Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_is_not_looked_for_above(tmp_path):
    place = look_at_place(tmp_path / "shm", may_be_made=False)
    assert (place.path, place.free_bytes) == (str(tmp_path / "shm"), 0)
    assert "No such file" in place.error


def test_places_are_looked_at_where_no_temporary_folder_can_be_written(tmp_path, monkeypatch, cache):
    def none():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(node_places.tempfile, "gettempdir", none)
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert list_places(tmp_path) == {
        "run_dir": tmp_path, "tmp": Path("/scratch"), "shm": Path("/dev/shm"), "cache": cache,
    }


def test_the_hash_of_the_sources_is_of_names_and_contents(tmp_path):
    package = tmp_path / "llava_ds"
    files = {
        "llava_ds/a.py": "1", "llava_ds/ops/k.cu": "2", "llava_ds/recipes/x/r.yaml": "3", "ds_configs/z.json": "4",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = hash_sources(package)
    (package / "a.pyc").write_text("no source")
    (tmp_path / "setup.py").write_text("not of the package")
    assert hash_sources(package) == before
    for name, text in files.items():
        (tmp_path / name).write_text(text + "5")
        assert hash_sources(package) != before, name
        (tmp_path / name).write_text(text)
    (package / "a.py").rename(package / "b.py")
    assert hash_sources(package) != before


def test_a_report_is_plain_data_that_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-7")
    (tmp_path / "d.json").write_text("[]")
    looked_at = []
    config = _config({"path": str(tmp_path / "d.json")})
    report = look_at_node(config, tmp_path / "runs" / "one", node_name(), looked_at.append)
    assert NodeReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    assert (report.node, report.error, report.notes) == ("gpu-7", "", [])
    assert report.versions["python"] == platform.python_version()
    assert report.versions["torch"] == metadata.version("torch")
    assert set(report.paths) == {"data.path", "model.vision_tower", "model.vision_pretrained", "model.llm"}
    assert [report.paths[setting].kind for setting in report.paths] == ["file", "missing", "missing", "missing"]
    assert {name: place.error for name, place in report.places.items() if name != "shm"} == {
        "run_dir": "", "tmp": "", "cache": "",
    }
    assert report.places["run_dir"].path == str(tmp_path)
    assert (len(report.code_hash), len(report.recipe_hash), report.num_workers) == (32, 32, 4)
    assert 1 <= report.num_cpus <= os.cpu_count()
    assert looked_at[2] == f"data.path={tmp_path / 'd.json'}"
    assert f"run_dir {tmp_path / 'runs' / 'one'}" in looked_at


def test_another_setting_is_another_recipe(tmp_path):
    first = look_at_node(_config({"path": "d.json"}), tmp_path, "a")
    assert look_at_node(_config({"path": "d.json"}), tmp_path, "b").recipe_hash == first.recipe_hash
    assert look_at_node(_config({"path": "e.json"}), tmp_path, "c").recipe_hash != first.recipe_hash
