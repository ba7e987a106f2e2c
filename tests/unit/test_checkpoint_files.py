"""Files of a checkpoint: marked when whole, checked against what was written, read in pieces, never executed."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ds.checkpoint.fragments import Fragment, open_optimizer, open_weights, shard_names, shard_tensors
from llava_ds.checkpoint.layout import (
    FileRecord,
    commit,
    find_damage,
    hash_file,
    list_steps,
    read_manifest,
    remove_folder,
    resolve_step,
    step_dir,
)
from llava_ds.checkpoint.lazy import LazyTensor, concatenated, in_memory
from llava_ds.checkpoint.tensor_files import find_weight_files, open_safetensors, open_tensors
from llava_ds.checkpoint.writer import read_back, split_shards, write_safetensors, write_sharded
from llava_ds.errors import CheckpointError
from llava_ds.metrics.trackers import JsonlTracker, read_metrics

TENSORS = {
    "a": torch.arange(15, dtype=torch.float32).reshape(3, 5),
    "b": torch.arange(7).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def _lazy(tensors=TENSORS):
    return [(name, in_memory(value)) for name, value in tensors.items()]


def _folder(root: Path) -> Path:
    folder = root / "step-00000003"
    (folder / "inner").mkdir(parents=True)
    (folder / "one").write_bytes(b"1" * 1000)
    (folder / "inner" / "two").write_bytes(b"2" * 77)
    commit(folder)
    return folder


def test_a_committed_folder_is_whole(tmp_path):
    folder = _folder(tmp_path)
    assert find_damage(folder) == []
    assert read_manifest(folder) == {
        "inner/two": FileRecord(77, hash_file(folder / "inner" / "two")),
        "one": FileRecord(1000, hash_file(folder / "one")),
    }
    assert resolve_step(folder) == folder


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda f: (f / "one").unlink(), "one: is missing"),
        (lambda f: (f / "one").write_bytes(b"1" * 999), "one: bytes 1000 expected, 999 found"),
        (lambda f: (f / "one").write_bytes(b"1" * 999 + b"0"), "one: xxh128 "),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json: xxh128 "),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda f: (f / "COMPLETE").write_text(""), "manifest.json: xxh128 none expected"),
        (lambda f: (f / "COMPLETE").unlink(), "is not complete"),
    ],
)
def test_every_change_is_found_and_named(tmp_path, change, wanted):
    folder = _folder(tmp_path)
    change(folder)
    (problem,) = find_damage(folder)
    assert wanted in problem
    assert str(folder) in problem


def test_sizes_alone_do_not_find_a_flipped_bit(tmp_path):
    folder = _folder(tmp_path)
    (folder / "one").write_bytes(b"0" * 1000)
    assert find_damage(folder, hashes=False) == []
    assert len(find_damage(folder, ["one"])) == 1 and find_damage(folder, ["inner/two"]) == []


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    folder = _folder(tmp_path / "checkpoints")

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_ds.checkpoint.layout.shutil.rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    assert folder.is_dir() and list_steps(tmp_path) == []


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    seen = []
    record = write_safetensors(tmp_path / "x.safetensors", _lazy(), seen.append, {"key": "value"})
    theirs, ours = load_file(tmp_path / "x.safetensors"), open_safetensors(tmp_path / "x.safetensors")
    assert theirs.keys() == ours.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(theirs[name], value) and torch.equal(ours[name].whole(), value)
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, tuple(value.shape))
    assert sum(seen) == sum(value.nbytes for value in TENSORS.values())
    assert record == FileRecord((tmp_path / "x.safetensors").stat().st_size, hash_file(tmp_path / "x.safetensors"))


def test_ours_reads_what_safetensors_writes_in_pieces_of_any_size(tmp_path):
    value = torch.randn(13, 7, 3)
    save_file({"x": value}, tmp_path / "x.safetensors")
    tensor = open_safetensors(tmp_path / "x.safetensors")["x"]
    for size in (1, 5, 64, 272, 273, 274):
        pieces = list(tensor.pieces(size))
        assert max(map(len, pieces)) <= size and torch.equal(torch.cat(pieces), value.flatten())
    assert torch.equal(tensor.rows(3, 9).whole(), value[3:9])
    assert torch.equal(tensor.cast(torch.bfloat16).whole(), value.to(torch.bfloat16))
    assert torch.equal(tensor.rows(2, 5).rows(1, 2).whole(), value[3:4])
    parts = concatenated([tensor.rows(9, 13), in_memory(torch.ones(2, 7, 3)), tensor.rows(0, 1)])
    expected = torch.cat([value[9:], torch.ones(2, 7, 3), value[:1]])
    assert torch.equal(parts.whole(), expected) and torch.equal(torch.cat(list(parts.pieces(10))), expected.flatten())


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_cut_safetensors_file_is_named(tmp_path, cut):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, _lazy())
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"{file} cannot be read"):
        open_safetensors(file)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, _lazy())
    tensor = open_safetensors(file)["a"]
    os.truncate(file, file.stat().st_size - 30)
    with pytest.raises(CheckpointError, match="cannot be read: it ends before"):
        tensor.whole()


def test_shards_are_split_as_transformers_expects(tmp_path):
    tensors = [(f"t{n}", in_memory(torch.full((n,), float(n)))) for n in (10, 3, 20, 5, 5)]
    names = [[name for name, _ in shard] for shard in split_shards(tensors, 52)]
    assert names == [["t10", "t3"], ["t20"], ["t5", "t5"]]
    tensors[-1] = ("last", tensors[-1][1])
    records = write_sharded(tmp_path, tensors, 52)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 43}
    assert sorted(records) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [file.name for file in find_weight_files(tmp_path)] == sorted(records)
    assert {name: tensor.shape for name, tensor in open_tensors(find_weight_files(tmp_path)).items()} == {
        name: tensor.shape for name, tensor in tensors
    }
    read_back(tmp_path, records)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors: xxh128"):
        read_back(tmp_path, records)


@pytest.mark.parametrize("numel", [11, 20_000_001])  # the larger one is read back in several stretches
def test_what_the_disk_does_not_hold_is_found_while_it_is_written(tmp_path, numel):
    """The last tensor's source writes into the file, behind the writer's back."""
    file, good = tmp_path / "x.safetensors", in_memory(torch.ones(numel))
    record = write_safetensors(file, [("good", good), ("last", in_memory(torch.zeros(3)))], verify=True)
    assert record == FileRecord(file.stat().st_size, hash_file(file))

    def damage(start: int, stop: int) -> torch.Tensor:
        with file.open("r+b") as handle:
            handle.seek(-4, os.SEEK_END)
            handle.write(b"\1")
        return torch.zeros(stop - start)

    with pytest.raises(CheckpointError, match="was written, [0-9a-f]{16} is read back; the disk is not to be trusted"):
        write_safetensors(file, [("good", good), ("last", LazyTensor(torch.float32, (3,), damage, ""))], verify=True)
    # Without reading back, what was meant is what is reported.
    unread = write_safetensors(file, [("good", good), ("last", LazyTensor(torch.float32, (3,), damage, ""))])
    assert unread.xxh128 != hash_file(file)


def test_a_full_disk_is_named_with_what_was_written():
    with pytest.raises(CheckpointError, match="/dev/full: No space left on device after 0 of"):
        write_safetensors(Path("/dev/full"), _lazy())


class _Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("save", [
    lambda value, file: torch.save(value, file),
    lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    lambda value, file: file.write_bytes(pickle.dumps(value)),
], ids=["archive", "legacy", "plain pickle"])
def test_code_in_a_file_of_others_is_never_executed(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"x": torch.ones(2), "evil": _Evil()}, tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="nothing else in it is ever executed"):
        open_tensors([tmp_path / "weights.bin"])
    assert not (tmp_path / "executed").exists()
    os.system(_Evil().__reduce__()[1][0])
    assert (tmp_path / "executed").exists()  # it would have been seen


@pytest.mark.parametrize("new_format", [True, False])
def test_pytorch_files_old_and_new_are_read(tmp_path, new_format):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    found = open_tensors(find_weight_files(tmp_path))
    assert {name: tensor.whole().tolist() for name, tensor in found.items()} == {
        name: value.tolist() for name, value in TENSORS.items()
    }


def test_no_file_is_loaded_as_code():
    """Every torch.load of the library says weights_only."""
    package, calls = Path(__file__).parents[2] / "llava_ds", 0
    for file in package.rglob("*.py"):
        for line in file.read_text().splitlines():
            if "torch.load(" in line:
                calls += 1
                assert "weights_only=True" in line, f"{file}: {line}"
            assert "pickle.load" not in line, f"{file}: {line}"
    assert calls > 0


def _write_step(step: Path, ranks: list[list[Fragment]], shapes: dict[str, list[int]]) -> Path:
    step.mkdir(parents=True)
    for rank, fragments in enumerate(ranks):
        for name, tensors in zip(shard_names(rank, len(ranks)), shard_tensors(fragments), strict=True):
            write_safetensors(step / name, tensors, metadata={"optimizer_steps": "{}"})
    (step / "step.json").write_text(json.dumps({"parameters": shapes}))
    commit(step)
    return step


def _fragment(start: int, stop: int, name: str = "w") -> Fragment:
    values = torch.arange(start, stop, dtype=torch.float32)
    return Fragment(name, start, values, {"exp_avg": values + 100})


def test_a_parameter_is_put_together_from_the_stretches_of_any_ranks(tmp_path):
    ranks = [[_fragment(0, 5), _fragment(0, 2, "v")], [], [_fragment(5, 6)], [_fragment(6, 12)]]
    step = _write_step(step_dir(tmp_path, 7), ranks, {"w": [3, 4], "v": [2]})
    weights, states = open_weights(step), open_optimizer(step)
    assert list(weights) == ["w", "v"]
    assert weights["w"].whole().tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert states["exp_avg/w"].whole().tolist() == (torch.arange(12.0).reshape(3, 4) + 100).tolist()
    assert weights["w"].read(4, 8).tolist() == [4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize(
    ("stretches", "wanted"),
    [
        ([(0, 5), (6, 12)], "elements 5 to 6 of w are missing"),
        ([(0, 7), (6, 12)], "elements 6 to 7 of w are there twice"),
        ([(0, 5)], "w has 5 of 12 elements"),
        ([], "w has 0 of 12 elements"),
    ],
)
def test_stretches_that_do_not_fit_together_are_refused(tmp_path, stretches, wanted):
    step = _write_step(step_dir(tmp_path, 7), [[_fragment(*one)] for one in stretches], {"w": [3, 4]})
    with pytest.raises(CheckpointError, match=wanted):
        open_weights(step)


def test_metrics_go_on_without_a_line_twice(tmp_path):
    file = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(file)
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": 1.0 / step})
    tracker.close()
    with file.open("a") as handle:
        handle.write('{"step": 4, "lo')  # a line that a kill cut off
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3]
    again = JsonlTracker(file, num_done=2)
    again.log({"step": 3, "loss": 0.25})
    again.close()
    records = read_metrics(file)
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert records[2]["elapsed_s"] >= records[1]["elapsed_s"]
    JsonlTracker(file).close()
    assert read_metrics(file) == []


def test_a_process_that_is_killed_while_it_commits_leaves_a_whole_folder_or_none(tmp_path):
    """The mark appears by a rename: it is never there without its content."""
    script = (
        "import sys; from pathlib import Path; from llava_ds.checkpoint.layout import commit\n"
        "for number in range(10**6):\n"
        "    folder = Path(sys.argv[1]) / 'checkpoints' / f'step-{number:08d}'; folder.mkdir(parents=True)\n"
        "    (folder / 'x').write_bytes(b'x' * 5000); commit(folder)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        while len(list_steps(tmp_path)) < 20 and process.poll() is None:
            pass
    finally:
        process.kill()
        process.wait()
    steps = list_steps(tmp_path)
    assert len(steps) >= 20
    assert [problem for step in steps for problem in find_damage(step)] == []
