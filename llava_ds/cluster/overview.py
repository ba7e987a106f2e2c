"""One line on each run of a folder: where it stands, how fast it goes, and why it last failed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llava_ds.cluster.run_files import METRICS_FILE, RunFiles, one_line, to_number
from llava_ds.cluster.run_state import State, find_state
from llava_ds.cluster.slurm_queue import job_states
from llava_ds.starts import STARTS_FOLDER, root_failure

_NUM_RECENT = 20
_SILENT_S = 300.0
"""A run without a new line for so long, and for ten steps, is silent."""


@dataclass(frozen=True)
class RunLine:
    """One run. What is not known, or does not apply, is None."""

    name: str
    """Its path in the folder that was asked for."""
    state: State
    step: int | None
    """Steps that are done."""
    num_steps: int | None
    loss: float | None
    samples_per_s: float | None
    """Median of the last lines of metrics.jsonl."""
    left_s: float | None
    """Only while it runs."""
    quiet_s: float | None
    """Since the last line of metrics.jsonl, or since this start began; only while it runs."""
    silent: bool
    """``quiet_s`` is longer than it should be."""
    restarts: int
    job: str | None
    """Of the last start."""
    slurm: str | None
    """What Slurm says of the job, see slurm_queue.py."""
    error: str | None
    """The last one, in one line."""
    broken: tuple[str, ...]
    """Files that cannot be read, or do not say what they should."""


def read_overview(
    folder: Path,
    ask_slurm: Callable[[Sequence[str]], Mapping[str, str]] = job_states,
    now: float | None = None,
) -> list[RunLine]:
    """The runs of a folder (or the one that it is) by name. Broken files are named in the lines, never raised."""
    runs = [RunFiles(run_dir) for run_dir in find_runs(folder)]
    states = ask_slurm(sorted({job for run in runs if (job := _job(run)) and _is_own(run.starts[-1].folder)}))
    now = time.time() if now is None else now
    return [describe_run(run, _name(run.run_dir, folder), states.get, now) for run in runs]


def find_runs(folder: Path) -> list[Path]:
    """Run folders: those with run.json or starts/. The folder itself, or else one and two levels below it."""
    if _is_run(folder):
        return [folder]
    found = []
    for child in _subfolders(folder):
        found += [child] if _is_run(child) else [below for below in _subfolders(child) if _is_run(below)]
    real = {run.resolve() for run in found if not run.is_symlink()}
    return [run for run in found if not (run.is_symlink() and run.resolve() in real)]


def describe_run(run: RunFiles, name: str, job_state: Callable[[str], str | None], now: float) -> RunLine:
    """The line of one run. ``job_state`` gives Slurm's state of a job, or None; ``now`` is in seconds since 1970."""
    job = _job(run)
    slurm = job_state(job) if job else None
    metrics = run.read_metrics(_NUM_RECENT)
    step, num_steps = _whole(_last(metrics, "step")), _whole(to_number(run.record.get("num_steps")))
    step = run.last_saved_step() if step is None else step
    step_s = _median(metrics, "step_s")
    quiet_s = max(0.0, now - _last_sign(run))
    silent = quiet_s > max(_SILENT_S, 10 * (step_s or 0.0))
    state = find_state(run, slurm, step, silent)
    runs = state == "running"
    left_s = None if None in (step, num_steps, step_s) else max(0, num_steps - step) * step_s  # type: ignore[operator]
    return RunLine(
        name=name, state=state, step=step, num_steps=num_steps,
        loss=_last(metrics, "loss"), samples_per_s=_median(metrics, "samples_per_s"),
        left_s=left_s if runs else None, quiet_s=quiet_s if runs else None, silent=runs and silent,
        restarts=_num_restarts(run), job=job, slurm=slurm, error=_last_error(run), broken=tuple(run.broken),
    )


def _last_sign(run: RunFiles) -> float:
    """When the run last did something, in seconds since 1970."""
    files = [run.run_dir / METRICS_FILE, run.run_dir / "run.json"]
    files += [run.starts[-1].folder / "start.json"] if run.starts else []
    return max((time_s for file in files if (time_s := _changed(file)) is not None), default=0.0)


def _last_error(run: RunFiles) -> str | None:
    """Of the last start that has one."""
    for start in reversed(run.starts):
        where = "" if start is run.starts[-1] else f"start {start.number}, "
        root = root_failure(run.read_failures(start))
        if root:
            return one_line(f"{where}rank {root.rank} on {root.host}: {root.error}: {root.message}")
        if start.end and start.end.reason in ("failed", "hung", "lost"):
            return one_line(f"{where}{start.end.reason}: {start.end.message}".removesuffix(": "))
    return None


def _num_restarts(run: RunFiles) -> int:
    resumed = run.record.get("resumed")
    return len(run.starts) - 1 if run.starts else len(resumed) if isinstance(resumed, list) else 0


def _job(run: RunFiles) -> str | None:
    job = run.starts[-1].facts.get("job") if run.starts else None
    return one_line(job) or None if job is not None else None


def _last(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return to_number(metrics[-1].get(key)) if metrics else None


def _median(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for record in metrics if (value := to_number(record.get(key))) is not None]
    return median(values) if values else None


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _changed(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _is_own(folder: Path) -> bool:
    """Slurm is asked only of jobs of this user: it may hide those of others."""
    try:
        return folder.stat().st_uid == os.getuid()
    except OSError:
        return False


def _name(run_dir: Path, folder: Path) -> str:
    return one_line(run_dir.absolute().name if run_dir == folder else run_dir.relative_to(folder))


def _is_run(folder: Path) -> bool:
    """A checkpoint holds a copy of run.json, too."""
    checkpoint = os.path.exists(folder / "step.json") or folder.absolute().parent.name == "checkpoints"
    has = os.path.isfile(folder / "run.json") or os.path.isdir(folder / STARTS_FOLDER)
    return has and not checkpoint


def _subfolders(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if os.path.isdir(entry.path))
    except OSError:
        return
    yield from (folder / name for name in names if not name.startswith("."))
