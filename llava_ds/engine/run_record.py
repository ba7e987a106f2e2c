"""What a run leaves beside its checkpoints: run.json before step 1, the loss curve and the next command at the end."""

from __future__ import annotations

import json
import os
import platform
import shlex
import uuid
from collections.abc import Mapping
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.layout import list_steps
from llava_ds.checkpoint.sources import describe_sources
from llava_ds.config import RunConfig, SourceConfig
from llava_ds.constants import FINISHED_MARKER
from llava_ds.data.build import EvalData, TrainingData
from llava_ds.data.sources.source import Source
from llava_ds.distributed import Ranks
from llava_ds.durable import replace_file
from llava_ds.engine.resume import ResumePoint, hash_data, set_aside_newer
from llava_ds.engine.run_lock import RunLock, check_not_held, hold_run
from llava_ds.engine.training_state import Progress
from llava_ds.errors import ConfigError
from llava_ds.metrics.plots import plot_loss
from llava_ds.metrics.trackers import read_metrics
from llava_ds.models.build import Backend
from llava_ds.models.llava import Llava

_PACKAGES = ("llava_ds", "torch", "deepspeed", "transformers", "open_clip_torch", "numpy")


def check_run_dir(run_dir: Path, ranks: Ranks) -> None:
    """Raises ConfigError on rank 0 when no run can be written there, or one is being written; writes nothing."""
    if not ranks.is_main:
        return
    if run_dir.name in ("", "..") or Path.cwd().is_relative_to(run_dir.resolve()):
        raise ConfigError(f"--run-dir {run_dir} holds the working folder {Path.cwd()}; name a folder of its own")
    nearest = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--run-dir {run_dir}: {nearest} is a file, not a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--run-dir {run_dir}: {nearest} is not writable; choose another")
    check_not_held(run_dir)


def start_run(
    run_dir: Path,
    config: RunConfig,
    ds_config: dict[str, Any],
    model: Llava,
    backends: Mapping[str, Backend],
    initial_weights: dict[str, Any],
    data: TrainingData,
    ranks: Ranks,
    point: ResumePoint | None = None,
    keep: bool = False,
) -> RunLock:
    """Writes run.json and says what is about to run; for rank 0. An earlier run in the folder is set aside, not lost.

    ``backends`` stand in run.json by their names: attention, packing, splice. A run that goes on from ``point`` keeps
    its folder; what is newer in it is set aside. So does one that should go on but has no checkpoint yet (``keep``).

    Returns the lock that keeps a second run out of the folder; hold it until the run ends.
    Raises ConfigError when another run holds it, or the folder cannot be made.
    """
    lock = _claim(run_dir, keep or point is not None)
    plan = data.plan
    resumed = [] if point is None else [*point.run["resumed"], {"step": point.progress.step,
                                                               "world_size": ranks.world_size}]
    record = {
        "run_id": uuid.uuid4().hex if point is None else point.run["run_id"],
        "config": config.model_dump(),
        "ds_config": ds_config,
        "tower": model.vision_tower.spec.as_dict(),
        **{name: vars(backend) for name, backend in backends.items()},
        "sources": describe_sources(config.model, config.seed),
        "initial_weights": initial_weights,
        "world_size": ranks.world_size,
        "num_samples": plan.num_samples,
        "num_steps": plan.num_steps,
        "data": [
            _describe_source(entry, source)
            for entry, source in zip(config.data.sources(), plan.source.sources, strict=True)
        ],
        "eval": _describe_eval(config, data.eval),
        "skipped": dict(data.skipped),
        "truncated": plan.lengths.num_cut(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
        "resumed": resumed,
    }
    (run_dir / FINISHED_MARKER).unlink(missing_ok=True)
    if point is not None:
        set_aside_newer(run_dir, point.progress.step)
    replace_file(run_dir / "run.json", json.dumps(record, indent=1) + "\n")
    print(f"{config.name}: {plan.num_samples} samples, {plan.num_steps} steps, {ranks.world_size} rank(s)")
    print("; ".join(f"{name}: {backend.name} ({backend.reason})" for name, backend in backends.items()))
    if data.skipped:
        print(f"skipped {sum(data.skipped.values())} samples: {dict(data.skipped)}")
    if plan.lengths.num_cut():
        print(f"{plan.lengths.num_cut()} samples lose their end: longer than data.max_length={config.data.max_length}")
    if data.eval is not None and config.eval is not None:
        print(f"evaluates {len(data.eval.plan.indices)} held-out samples every {config.eval.steps} step(s)")
    if point is not None:
        print(f"resumed from {point.folder}: step {point.progress.step} of {plan.num_steps} is done")
    return lock


def _describe_source(entry: SourceConfig, source: Source) -> dict[str, Any]:
    facts = {"num_records": len(source), "fingerprint": source.fingerprint, "xxh128": hash_data(entry.path)}
    return entry.model_dump() | facts


def _describe_eval(config: RunConfig, held_out: EvalData | None) -> dict[str, Any] | None:
    """What is evaluated, with data of its own (None: it is held out of those of training)."""
    if held_out is None or config.eval is None:
        return None
    plan, entry = held_out.plan, config.eval.source()
    return {
        "num_samples": len(plan.indices),
        "num_supervised_tokens": plan.num_supervised,
        "data": entry and _describe_source(entry, plan.source),
        "skipped": dict(plan.lengths.skipped()) if entry else {},
    }


def _claim(run_dir: Path, keep: bool = False) -> RunLock:
    """A locked run folder. It is empty, as a finished run in it moves aside, unless the run goes on (``keep``)."""
    run_dir = run_dir.resolve()  # what a link names moves, not the link
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = hold_run(run_dir)
        if keep or not ((run_dir / "run.json").exists() or list_steps(run_dir)):
            return lock
        number = next(n for n in count(1) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
        aside = run_dir.with_name(f"{run_dir.name}.{number}")
        run_dir.rename(aside)
        lock.release()
        print(f"{run_dir} held an earlier run; it is now {aside}")
        run_dir.mkdir()
        return hold_run(run_dir)
    except OSError as error:
        raise ConfigError(f"--run-dir {run_dir} cannot be written: {error}; choose another") from error


def finish_run(run_dir: Path, config: RunConfig, progress: Progress, seconds: float, ranks: Ranks) -> None:
    """Draws the loss curve, prints where everything is, and marks the run as finished (rank 0)."""
    if not ranks.is_main:
        return
    plot_loss({config.name: read_metrics(run_dir / "metrics.jsonl")}, run_dir / "loss.png")
    print(f"{config.name}: {progress.step} steps in {seconds:.0f} s, last loss {progress.loss:.4f}, in {run_dir}")
    replace_file(run_dir / FINISHED_MARKER, f"{progress.step}\n")
    if config.next_command:
        print(f"Next: {config.next_command.replace('{run_dir}', shlex.quote(str(run_dir)))}")
