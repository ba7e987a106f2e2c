#!/usr/bin/env python3
"""Kills runs at random moments, again and again, and compares what they end with to a run that nothing happened to.

    tests/checkpoints/kills.py --kills 100 [--seed 0]

Every start is the real deepspeed launcher with two ranks under ZeRO-3, and the same command. Half of the kills hit one
rank, half hit all processes at once; a third of the moments lie in start-up, the others in training and saving.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_ds.checkpoint.layout import list_steps, step_dir, step_number
from llava_ds.metrics.trackers import read_metrics
from tests.helpers.launch import ROOT, TRAIN, clean_environ, deepspeed_command, read_lines, read_tensors
from tests.helpers.tiny import write_recipe, write_world

NUM_RANKS, NUM_STEPS = 2, 60
LONGEST_S = 300


@dataclass
class Outcome:
    """What happened to the runs."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    resumed_from: list[int] = field(default_factory=list)
    """The last committed step when each kill came; -1 before the first."""
    unfinished: int = 0
    """Checkpoints that a kill left without their mark."""


def start(recipe: Path, run_dir: Path) -> psutil.Popen:
    """One launch; its output goes to ``<run_dir>.log``."""
    options = ["--deepspeed", ROOT / "ds_configs" / "zero3.json", "--recipe", recipe, "--run-dir", run_dir, "--resume"]
    with run_dir.with_suffix(".log").open("a") as log:
        command = deepspeed_command(NUM_RANKS, TRAIN, *options)
        return psutil.Popen(command, env=clean_environ(), stdout=log, stderr=log, start_new_session=True)


def kill(launcher: psutil.Popen, one: bool, rng: random.Random) -> str | None:
    """Kills one rank and lets the launcher end the rest, or kills all; None when there is nothing to kill any more."""
    if launcher.poll() is not None:
        return None
    processes = launcher.children(recursive=True)
    ranks = [process for process in processes if any("--local_rank" in word for word in _words(process))]
    if one and len(ranks) == NUM_RANKS:
        rng.choice(ranks).kill()
        launcher.wait(timeout=LONGEST_S)
    else:
        one = False
        for process in (launcher, *processes):
            if process.is_running():
                process.kill()
        launcher.wait(timeout=LONGEST_S)
    psutil.wait_procs(processes, timeout=LONGEST_S)
    return "one rank" if one else "all"


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_to_kill(launcher: psutil.Popen, run_dir: Path, rng: random.Random) -> None:
    """Waits for a moment: within 12 s of start-up, or up to four seconds after the first new step."""
    if rng.random() < 1 / 3:
        _wait(launcher, lambda: False, rng.uniform(0.5, 12))
        return
    lines = [len(read_metrics(run_dir / "metrics.jsonl"))]

    def has_new_step() -> bool:
        now = len(read_metrics(run_dir / "metrics.jsonl"))
        lines[0] = min(lines[0], now)  # resuming takes the lines after its checkpoint away
        return now > lines[0]

    _wait(launcher, has_new_step, LONGEST_S)
    _wait(launcher, lambda: False, rng.uniform(0, 4))


def _wait(launcher: psutil.Popen, arrived, seconds: float) -> None:
    end = time.monotonic() + seconds
    while launcher.poll() is None and time.monotonic() < end and not arrived():
        time.sleep(0.01)


def run_to_its_end(recipe: Path, run_dir: Path, most_kills: int, rng: random.Random, outcome: Outcome) -> None:
    """Starts a run, kills it, starts it again; at most ``most_kills`` times."""
    outcome.runs += 1
    for _ in range(most_kills):
        launcher = start(recipe, run_dir)
        wait_to_kill(launcher, run_dir, rng)
        how = kill(launcher, rng.random() < 0.5, rng)
        if how is None:
            _check_code(launcher, run_dir)
            return  # it was faster
        steps = list_steps(run_dir)
        outcome.kills[how] += 1
        outcome.resumed_from.append(step_number(steps[-1]) if steps else -1)
        outcome.unfinished += len(list(run_dir.glob("checkpoints/step-*"))) - len(steps)
    launcher = start(recipe, run_dir)
    launcher.wait(timeout=LONGEST_S)
    _check_code(launcher, run_dir)


def _check_code(launcher: psutil.Popen, run_dir: Path) -> None:
    if launcher.returncode:
        log = run_dir.with_suffix(".log").read_text()
        raise AssertionError(f"a start ended with exit code {launcher.returncode} by itself:\n{log[-4000:]}")


def kill_and_compare(folder: Path, num_kills: int, seed: int, log=print) -> Outcome:
    """Kills runs ``num_kills`` times. Raises AssertionError when one of them ends with other numbers or weights."""
    rng, outcome = random.Random(seed), Outcome()
    recipe = write_recipe(write_world(folder), train__max_steps=NUM_STEPS, train__epochs=1000,
                          train__save_steps=2, train__micro_batch_size=1)
    expected = folder / "undisturbed"
    run_to_its_end(recipe, expected, 0, rng, Outcome())
    weights = read_tensors(step_dir(expected, NUM_STEPS))
    while (done := sum(outcome.kills.values())) < num_kills:
        run_dir = folder / f"killed-{outcome.runs}"
        run_to_its_end(recipe, run_dir, num_kills - done, rng, outcome)
        assert read_lines(run_dir) == read_lines(expected), run_dir
        found = read_tensors(step_dir(run_dir, NUM_STEPS))
        assert found.keys() == weights.keys() and len(found) > 60
        differing = [name for name, value in weights.items() if not torch.equal(found[name], value)]
        assert not differing, (run_dir, differing)
        log(f"{sum(outcome.kills.values())} kills, {outcome.runs} run(s) at their end, as if nothing had happened")
    return outcome


@click.command()
@click.option("--kills", "num_kills", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(num_kills: int, seed: int) -> None:
    """Prints what was killed where, and that every run ended with the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        outcome = kill_and_compare(Path(folder), num_kills, seed)
        print(f"{num_kills} kills ({dict(outcome.kills)}) of {outcome.runs} runs in {time.monotonic() - begin:.0f} s; "
              f"{outcome.unfinished} left a checkpoint unfinished; resumed from steps {outcome.resumed_from}")


if __name__ == "__main__":
    main()
