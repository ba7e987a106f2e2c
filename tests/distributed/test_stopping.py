"""A signal to one rank ends all after a checkpoint; a rank that hangs is named with its samples and its stack."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_ds.checkpoint.layout import list_steps, step_number
from llava_ds.distributed import free_port
from llava_ds.engine.preemption import EXIT_STOPPED
from llava_ds.engine.watchdog import EXIT_HUNG
from llava_ds.metrics.trackers import read_metrics
from llava_ds.starts import conclude, list_starts
from tests.helpers.launch import ROOT, TRAIN, clean_environ
from tests.helpers.tiny import write_recipe, write_world

pytestmark = pytest.mark.slow


def _start(run_dir: Path, recipe: Path, *options: str) -> list[subprocess.Popen]:
    """Two ranks, each a process of the test's own: no launcher stands between."""
    environ = clean_environ() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(TRAIN), "--deepspeed", str(ROOT / "ds_configs" / "zero3.json"), "--recipe",
               str(recipe), "--run-dir", str(run_dir), "--resume", *options]
    ranks = []
    for rank in range(2):
        own = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with run_dir.with_name(f"{run_dir.name}.{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
    return ranks


def _wait_for_steps(run_dir: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(read_metrics(run_dir / "metrics.jsonl")) < count:
        assert time.monotonic() < end, [file.read_text()[-3000:] for file in run_dir.parent.glob("*.log")]
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen]) -> list[int]:
    try:
        return [rank.wait(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(write_world(tmp_path_factory.mktemp("world")), train__max_steps=4000, train__epochs=10_000,
                        train__micro_batch_size=1)


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGUSR1), (0, signal.SIGTERM)])
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path, recipe, rank, number):
    run_dir = tmp_path / "run"
    ranks = _start(run_dir, recipe, "--set", "data.num_workers=2")
    _wait_for_steps(run_dir, 3)
    os.kill(ranks[rank].pid, number)
    assert _end(ranks) == [EXIT_STOPPED] * 2
    step = step_number(list_steps(run_dir)[-1])
    assert step == read_metrics(run_dir / "metrics.jsonl")[-1]["step"] >= 3
    (start,) = list_starts(run_dir)
    assert (start.end.reason, start.end.step, start.facts["num_ranks"]) == ("stopped", step, 2)


def test_a_hanging_rank_is_named_with_step_samples_and_stack(tmp_path, recipe):
    """Reading a picture that is a pipe which nobody writes to does not end."""
    run_dir, picture = tmp_path / "run", recipe.parent / "data" / "5.png"
    ranks = _start(run_dir, recipe, "--set", "train.hang_timeout_s=6")
    _wait_for_steps(run_dir, 3)
    picture.unlink()
    os.mkfifo(picture)
    begin = time.monotonic()
    assert _end(ranks) == [EXIT_HUNG] * 2
    assert time.monotonic() - begin < 40
    (start,) = list_starts(run_dir)
    end = conclude(start.folder)
    assert end.reason == "hung"
    for part in ("has not gone on", f"step {end.step + 1}, reading data, samples ", "s5", "Its stack:", "images.py",
                 "agreeing that all have data"):
        assert part in end.message, part
    assert len(json.loads((start.folder / "failed-00000.json").read_text())["message"]) > 500
