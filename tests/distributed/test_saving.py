"""One rank: which checkpoints stay, how a run goes on, and what ends it before a step is wasted."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_ds.checkpoint.layout import find_damage, list_steps, step_dir, step_number
from tests.helpers.launch import clean_environ, fork_alone, read_lines, read_tensors, train_script
from tests.helpers.tiny import write_recipe, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("saving"))


def _run(recipe: Path, run_dir: Path, *options: str) -> subprocess.CompletedProcess:
    return fork_alone(train_script(recipe, "zero0", run_dir, *options))


def _steps(run_dir: Path) -> list[int]:
    return [step_number(step) for step in list_steps(run_dir)]


def test_the_last_and_every_third_stay_and_the_run_goes_on_from_them(world):
    recipe = write_recipe(world, train__max_steps=7, train__save_steps=1, train__keep_last=2, train__keep_every=3)
    run = world / "kept"
    first = _run(recipe, run, "--resume")
    assert first.returncode == 0, first.stderr[-3000:]
    assert "has no checkpoint yet; the run starts at its beginning" in first.stdout
    assert _steps(run) == [3, 6, 7]
    assert [find_damage(step) for step in list_steps(run)] == [[], [], []]
    saved = json.loads((step_dir(run, 7) / "step.json").read_text())["saved"]
    assert saved["bytes"] > 12 * 5000 and 0 < saved["blocked_s"] < saved["seconds"]
    lines, tensors = read_lines(run), read_tensors(step_dir(run, 7))
    shutil.copytree(run, world / "again")
    again = _run(recipe, world / "again", "--resume", "3")
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resumed from {step_dir(world / 'again', 3)}: step 3 of 7 is done" in again.stdout
    assert _steps(world / "again") == [3, 6, 7]
    assert read_lines(world / "again") == lines
    assert len(lines) == 7 and lines[3]["loss"] != lines[4]["loss"]
    found = read_tensors(step_dir(world / "again", 7))
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    done = _run(recipe, world / "again", "--resume")  # a run that is at its end stays as it is
    assert done.returncode == 0, done.stderr[-3000:]
    assert _steps(world / "again") == [3, 6, 7] and read_lines(world / "again") == lines


def test_a_run_that_could_not_be_exported_ends_before_it_is_trained(world):
    """The projector neither trains nor comes from anywhere: it would be random for ever."""
    recipe = write_recipe(world, train__trainable=["llm"], train__max_steps=500, train__epochs=1000)
    done = _run(recipe, world / "no_source")
    assert done.returncode == 1
    assert "2 tensor(s) have no source" in done.stderr and "projector.weight, projector.bias" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (world / "no_source" / "metrics.jsonl").exists()
    assert _steps(world / "no_source") == [0]


def test_a_run_that_diverges_keeps_every_step_that_it_saved(world):
    recipe = write_recipe(world, train__learning_rate=1e30, train__save_steps=1, train__keep_last=9)
    done = _run(recipe, world / "diverged")
    assert done.returncode == 1 and "ConfigError: the loss of step" in done.stderr
    steps = [line["step"] for line in read_lines(world / "diverged")]
    assert _steps(world / "diverged") == [0, *steps] and len(steps) >= 1


def test_what_else_lies_among_the_checkpoints_is_left_alone(world):
    """A copy that a user made, while older steps go and when the run is resumed; run.json may be gone or broken."""
    recipe = write_recipe(world, train__max_steps=3, train__save_steps=1, train__keep_last=1, train__keep_every=2)
    run = world / "with_copy"
    assert _run(recipe, run).returncode == 0
    copy = run / "checkpoints" / "step-00000002-good"
    shutil.copytree(step_dir(run, 2), copy)
    before = read_tensors(step_dir(run, 3))
    (run / "run.json").write_text("{")
    again = _run(recipe, run, "--resume", "2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert _steps(run) == [2, 3] and find_damage(copy) == []
    found = read_tensors(step_dir(run, 3))
    assert all(torch.equal(found[name], value) for name, value in before.items())
    (run / "run.json").unlink()
    anew = _run(recipe, run)  # without --resume: what is there moves aside as a whole
    assert anew.returncode == 0, anew.stderr[-3000:]
    assert "held an earlier run" in anew.stdout
    assert _steps(run) == [2, 3] == _steps(world / "with_copy.1") and not copy.exists()


def test_a_disk_that_is_too_small_or_fills_up_ends_the_run_with_both_numbers(world):
    """A file system of its own for each run: 12 MB, and 24 MB that somebody else fills after the first save."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts of one's own")
    recipe = write_recipe(world, train__max_steps=4000, train__epochs=9000, train__save_steps=2000)
    mount = 'mount -t tmpfs -o size="$1" none "$2"; shift 2; '
    wait = 'while ! ls "$0"/run/checkpoints/*/COMPLETE; do sleep 0.1; done'
    fill = f'({wait}; cat /dev/zero > "$0/fill") > /dev/null 2>&1 & '
    for name, size, also in (("small", "12m", ""), ("filled", "24m", fill)):
        disk = world / name
        disk.mkdir()
        inside = ["sh", "-c", f'{mount}{also}"$@"; code=$?; ls "$0/run/checkpoints"; exit $code', str(disk), size,
                  str(disk), sys.executable, *train_script(recipe, "zero0", disk / "run")]
        done = subprocess.run(["unshare", "-rm", *inside], env=clean_environ(), capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 1, done.stderr[-3000:]
        assert "CheckpointError: " in done.stderr and "Traceback" not in done.stderr
        no_room = f"cannot be saved: {disk}/run has 0.0" in done.stderr and "needed" in done.stderr
        # A disk that is full is met by whatever is written next: a line of metrics, or a checkpoint.
        assert no_room or (name == "filled" and "No space left on device" in done.stderr)
        steps = done.stdout.split("\n")
        assert ("step-00000000" in steps) == (name == "filled")
        assert ("Step 0 is the last that is saved" in done.stderr) == (name == "filled")
