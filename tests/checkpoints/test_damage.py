"""What is damaged is found before training, named, and the checkpoint before it is taken; a full disk ends a run on all
ranks, and loses nothing that was committed."""

import shutil
from pathlib import Path

import pytest
import torch

from llava_ds.checkpoint.layout import list_steps, step_dir
from tests.helpers.launch import read_lines, read_tensors, run_cases
from tests.helpers.tiny import write_recipe, write_world

pytestmark = pytest.mark.slow

LAST, BEFORE = "step-00000006", "step-00000004"
WEIGHTS, OPTIMIZER = "weights-00001-of-00002.safetensors", "optimizer-00000-of-00002.safetensors"


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _damage_everything(run: Path) -> None:
    for step in list_steps(run):
        _flip(step / WEIGHTS)


# What is done to a run, and what is said about it. Every one goes on from the step before.
DAMAGE = {
    "missing shard": (lambda run, _: (run / LAST / WEIGHTS).unlink(), f"{LAST}/{WEIGHTS}: is missing"),
    "truncated shard": (lambda run, _: _cut(run / LAST / OPTIMIZER), f"{LAST}/{OPTIMIZER}: bytes "),
    "flipped bit": (lambda run, _: _flip(run / LAST / WEIGHTS), f"{LAST}/{WEIGHTS}: xxh128 "),
    "flipped bit in step.json": (lambda run, _: _flip(run / LAST / "step.json"), f"{LAST}/step.json: xxh128 "),
    "shard of another step": (
        lambda run, _: shutil.copy(run / BEFORE / OPTIMIZER, run / LAST / OPTIMIZER), f"{LAST}/{OPTIMIZER}: xxh128 "
    ),
    "flipped bit in the manifest": (
        lambda run, _: _flip(run / LAST / "manifest.json"), f"{LAST}/manifest.json: xxh128 "
    ),
    "deleted mark": (lambda run, _: (run / LAST / "COMPLETE").unlink(), f"{LAST} was not finished"),
    "checkpoint of another run": (
        lambda run, other: (shutil.rmtree(run / LAST), shutil.copytree(other / LAST, run / LAST)), "is of the run "
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def runs(world) -> list[dict]:
    """Two whole runs of two ranks, of the same recipe but for the seed."""
    steps = {"train__max_steps": 6, "train__save_steps": 2, "train__keep_last": 9, "train__micro_batch_size": 1}
    recipes = [write_recipe(world, **steps), write_recipe(world, **steps, train__learning_rate=2e-3)]
    cases = [{"recipe": str(recipe), "zero": "zero3", "run_dir": str(world / name)}
             for recipe, name in zip(recipes, ("run", "other"), strict=True)]
    outcomes = run_cases(world, 2, cases)
    assert [case["outcome"] for rank in outcomes for case in rank] == ["fine"] * 4
    return cases


def test_damage_is_named_and_the_step_before_is_taken(world, runs):
    run, other = (Path(case["run_dir"]) for case in runs)
    cases = []
    for number, (damage, _) in enumerate(DAMAGE.values()):
        copy = world / f"damaged-{number}"
        shutil.copytree(run, copy)
        damage(copy / "checkpoints", other / "checkpoints")
        cases.append(runs[0] | {"run_dir": str(copy), "resume": "last"})
    outcomes = run_cases(world, 2, cases)
    expected = read_tensors(step_dir(run, 6))
    for number, (name, (_, wanted)) in enumerate(DAMAGE.items()):
        assert [rank[number]["outcome"] for rank in outcomes] == ["fine"] * 2, name
        said = outcomes[0][number]["output"]
        assert wanted in said, (name, said)
        assert f"resumed from {world / f'damaged-{number}' / 'checkpoints' / BEFORE}: step 4 of 6" in said
        copy = world / f"damaged-{number}"
        assert read_lines(copy) == read_lines(run)
        found = read_tensors(step_dir(copy, 6))
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
        assert (copy / "checkpoints" / f"set-aside-{LAST}").is_dir() == (name != "deleted mark")
    assert len(expected) > 60


def test_without_a_whole_checkpoint_nothing_is_trained_and_nothing_is_lost(world, runs):
    run = Path(runs[0]["run_dir"])
    ruined, asked = world / "ruined", world / "asked"
    shutil.copytree(run, ruined)
    _damage_everything(ruined)
    shutil.copytree(run, asked)
    _flip(asked / "checkpoints" / BEFORE / WEIGHTS)
    before = {folder: sorted(folder.rglob("*")) for folder in (ruined, asked)}
    cases = [runs[0] | {"run_dir": str(ruined), "resume": "last"}, runs[0] | {"run_dir": str(asked), "resume": "4"},
             runs[0] | {"run_dir": str(asked), "resume": "5"}, runs[0] | {"run_dir": str(asked), "resume": "six"}]
    outcomes = run_cases(world, 2, cases)
    for rank in range(2):
        every, one, absent, word = (case["outcome"] for case in outcomes[rank])
        assert "has no whole checkpoint:" in every
        assert [f"step-0000000{step}/{WEIGHTS}: xxh128" in every for step in (0, 2, 4, 6)] == [True] * 4
        assert "has no whole checkpoint of step 4" in one and f"{BEFORE}/{WEIGHTS}: xxh128" in one
        assert "--resume 5" in absent and "complete: 0, 2, 4, 6" in absent
        assert "--resume six: give the number of a step" in word
    assert {folder: sorted(folder.rglob("*")) for folder in (ruined, asked)} == before


def test_a_full_disk_ends_the_run_on_all_ranks_and_what_is_committed_stays(world, runs):
    """Rank 1 cannot write a file of its full size: in one run not at all, in another not with optimizer states."""
    run = Path(runs[0]["run_dir"])
    sizes = [(step_dir(run, step) / f"{kind}-00001-of-00002.safetensors").stat().st_size
             for step in (0, 6) for kind in ("weights", "optimizer")]
    assert sizes[1] < sizes[0] == sizes[2] < sizes[3]
    cases = [runs[0] | {"run_dir": str(world / name), "largest_file": size}
             for name, size in (("full", 5000), ("fills up", sizes[2]))]
    outcomes = run_cases(world, 2, cases)
    for rank in range(2):
        first, later = (case["outcome"] for case in outcomes[rank])
        assert first.startswith("CheckpointError: rank 1: ") and later.startswith("CheckpointError: rank 1: ")
        assert f"step-00000000/{WEIGHTS}: File too large after 5000 of {sizes[0]} bytes" in first
        assert f"step-00000002/optimizer-00001-of-00002.safetensors: File too large after {sizes[2]} of" in later
        assert "No step is saved" in first and "Step 0 is the last that is saved; start again with --resume" in later
    assert list_steps(world / "full") == []
    assert [step.name for step in list_steps(world / "fills up")] == ["step-00000000"]
    (done,) = run_cases(world, 2, [runs[0] | {"run_dir": str(world / "fills up"), "resume": "last"}])[0]
    assert done["outcome"] == "fine"
    assert read_lines(world / "fills up") == read_lines(run)
    expected, found = (read_tensors(step_dir(folder, 6)) for folder in (run, world / "fills up"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
