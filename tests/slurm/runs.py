"""Training runs on a cluster for tests: a tiny world, its settings, and what a run leaves."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.layout import list_steps, step_dir, step_number
from llava_ds.metrics.trackers import read_metrics
from llava_ds.starts import Start, list_starts
from tests.helpers.launch import ROOT, read_lines, read_tensors
from tests.slurm.cluster import Cluster

PATIENCE_S = 300


@dataclass
class Job:
    """One run of slurm/stage1.sh in a runs folder of its own."""

    cluster: Cluster
    runs: Path
    settings: dict[str, str]
    options: tuple[str, ...] = ()
    flags: str = ""
    """Of sbatch."""
    id: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def run_dir(self) -> Path:
        """Of stage 1."""
        return self.runs / "stage1"

    def submit(self, script: str = "slurm/stage1.sh") -> "Job":
        """Runs the script outside a job, so that it submits itself."""
        done = self.cluster.login("bash", script, *self.options, env=self.environ(), cwd=ROOT)
        self.id = int(done.stdout.split("job ")[1].split(":")[0])
        return self

    def submit_chain(self) -> list[str]:
        """Runs slurm/pipeline.sh; its lines, one a job."""
        done = self.cluster.login("bash", "slurm/pipeline.sh", env=self.environ(), cwd=ROOT)
        return [line for line in done.stdout.splitlines() if line.startswith("job ")]

    def environ(self) -> dict[str, str]:
        """Of a user who logs in, with the settings."""
        facts = {"LLAVA_RUNS": str(self.runs), "LLAVA_SBATCH": self.flags, "OMP_NUM_THREADS": "1"}
        return slurm_free_environ() | facts | self.settings

    def wait_for_step(self, step: int, start: Start | None = None, seconds: float = PATIENCE_S) -> None:
        """Until the run has logged a step, since ``start`` began."""
        def is_there() -> bool:
            file = self.run_dir / "metrics.jsonl"
            fresh = start is None or (file.exists() and file.stat().st_mtime > start.facts["time"])
            return (fresh and self.step() >= step) or self._is_over()
        self.cluster.wait_for(is_there, seconds, f"step {step} of {self.runs.name}")
        assert self.step() >= step, self.output()

    def step(self) -> int:
        """The last step that was logged."""
        records = read_metrics(self.run_dir / "metrics.jsonl")
        return records[-1]["step"] if records else 0

    def committed(self) -> int:
        """The last step that is saved."""
        steps = list_steps(self.run_dir)
        return step_number(steps[-1]) if steps else -1

    def wait_for_start(self, number: int, seconds: float = PATIENCE_S) -> Start:
        """Until the run is started for the ``number``-th time."""
        def started() -> bool:
            return len(self.starts()) >= number
        self.cluster.wait_for(started, seconds, f"start {number} of {self.runs.name}")
        return self.starts()[number - 1]

    def wait(self, state: str = "COMPLETED", seconds: float = PATIENCE_S) -> None:
        """Until the job has ended in a state."""
        found = self.cluster.wait_for_state(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=seconds)
        assert found["JobState"] == state, f"{found['JobState']}: {self.output()}"

    def starts(self) -> list[Start]:
        """The starts of the run."""
        return list_starts(self.run_dir)

    def ends(self) -> list[tuple[str, str | None]]:
        """(reason, decision) of each start."""
        return [(start.end.reason, start.end.decision) if start.end else ("", None) for start in self.starts()]

    def output(self) -> str:
        """What the batch script wrote."""
        files = sorted(self.runs.glob("slurm-*.out"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-4000:]}" for file in files)

    def _is_over(self) -> bool:
        return self.cluster.job(self.id)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def slurm_free_environ() -> dict[str, str]:
    """The environment of a user who logs in."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "LLAVA_"))}


def assert_same_end(found: Path, expected: Path) -> None:
    """Two runs left the same numbers for every step, and the same bits."""
    lines = read_lines(expected)
    assert read_lines(found) == lines and len(lines) > 50
    last = step_number(list_steps(expected)[-1])
    weights, other = (read_tensors(step_dir(folder, last)) for folder in (expected, found))
    assert weights.keys() == other.keys() and len(weights) > 60
    differing = [name for name, value in weights.items() if not torch.equal(other[name], value)]
    assert not differing, differing


def read_json(file: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(file.read_text())
