"""Small decisions at the start of a run: device, precision, trackers, initial weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_ds.checkpoint.fragments import open_weights
from llava_ds.checkpoint.initial import InitialWeights, apply_weights, open_initial, reopen_initial
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.merge import trial_export
from llava_ds.checkpoint.runs import open_run
from llava_ds.config import RunConfig, TrainConfig
from llava_ds.data.build import TrainingData
from llava_ds.distributed import Ranks, gather_objects, run_on_main_alone, run_on_main_first
from llava_ds.engine.deepspeed_backend import load_full_parameter
from llava_ds.engine.evaluation import Evaluator
from llava_ds.engine.loop import LoopSettings, Tracker
from llava_ds.engine.preemption import StopNotice
from llava_ds.engine.resume import TRIAL_PREFIX, ResumePoint
from llava_ds.engine.run_lock import RunLock
from llava_ds.engine.saving import SavePolicy, Saver
from llava_ds.engine.start_report import StartReport
from llava_ds.engine.training_state import Progress
from llava_ds.engine.watchdog import UnwatchedGuard, Watchdog
from llava_ds.errors import ConfigError
from llava_ds.metrics.trackers import EXTRA_TRACKERS, JsonlTracker, ProgressBar
from llava_ds.models.build import DTYPES, Backend, resolve_attention, resolve_packing, resolve_splice


def load_weights(
    model: nn.Module, init_from: str | None, run_dir: Path, point: ResumePoint | None, ranks: Ranks
) -> dict[str, Any]:
    """Loads the weights of the checkpoint that the run goes on from, or of ``init_from``; see these two."""
    return load_resumed_weights(model, point, ranks) if point else load_initial_weights(
        model, init_from, run_dir, ranks
    )


def load_initial_weights(model: nn.Module, init_from: str | None, run_dir: Path, ranks: Ranks) -> dict[str, Any]:
    """Loads the weights of ``init_from``, one at a time; returns what run.json keeps of where they came from.

    Raises:
        CheckpointError: there are none, or they do not fit.
        ConfigError: they lie in the folder that this run is about to take.
    """
    if init_from is None:
        return InitialWeights().record
    # Rank 0 reads and hashes the files; the others find the hashes kept.
    initial = run_on_main_first(ranks, lambda: open_initial(Path(init_from), fresh=ranks.is_main))
    if any(Path(file).is_relative_to(run_dir.resolve()) for source in initial.record["sources"]
           for file in source["xxh128"]):
        raise ConfigError(
            f"model.init_from={init_from!r} lies in {run_dir}, which this run would set aside; give another --run-dir"
        )
    _load(model, initial.weights, ranks)
    return initial.record


def load_resumed_weights(model: nn.Module, point: ResumePoint, ranks: Ranks) -> dict[str, Any]:
    """Loads the weights of a checkpoint, and what its run did not train from where it started; returns the record.

    Raises CheckpointError when they do not fit, or are not those that the run started from.
    """
    weights, record = open_weights(point.folder), point.run["initial_weights"]
    inherited = [name for name, _ in model.named_parameters() if name not in weights]
    started_from = run_on_main_first(ranks, lambda: reopen_initial(record, point.folder, inherited))
    _load(model, started_from | weights, ranks)
    return record


def _load(model: nn.Module, weights: Mapping[str, LazyTensor], ranks: Ranks) -> None:
    notes = apply_weights(model, weights, lambda p, value: load_full_parameter(p, value, ranks.is_main))
    for note in notes if ranks.is_main else ():
        print(note)


def build_saver(
    engine: Any,
    run_dir: Path,
    train: TrainConfig,
    ranks: Ranks,
    data_digest: str,
    progress: Progress,
    lock: RunLock | None = None,
) -> Saver:
    """What saves the run's steps while rank 0 holds ``lock``.

    A run that begins is saved, and its export tried, at once (``train.trial_save``).

    Raises CheckpointError on every rank when the run could not be saved or exported at its end.
    """
    policy = SavePolicy(train.keep_last, train.keep_every, train.save_in_background)
    run_record = (run_dir / "run.json").read_text() if ranks.is_main else ""
    saver = Saver(engine, run_dir, ranks, policy, run_record, {"data_digest": data_digest})
    if lock:
        saver.check_owner = lock.check
    if progress.step:
        saver.committed = progress.step
    elif train.trial_save:
        saver.on_first_commit = _try_export
        saver.save_now(progress)
    return saver


def _try_export(step: Path) -> None:
    """Raises CheckpointError or ConfigError when the run could be trained, but not be exported at its end."""
    with tempfile.TemporaryDirectory(dir=step.parent, prefix=TRIAL_PREFIX) as scratch:
        trial_export(open_run(step), Path(scratch))


def build_guard(
    config: RunConfig,
    device: torch.device,
    ranks: Ranks,
    notice: StopNotice,
    report: StartReport,
    name_sample: Callable[[int], str],
) -> Watchdog | UnwatchedGuard:
    """Who watches over the ranks from now on (``train.hang_timeout_s``). Collective; stop it when training is over."""
    timeout_s = config.train.hang_timeout_s
    if timeout_s is None:
        return UnwatchedGuard(notice)
    by_stack = device.type == "cpu"  # with NCCL a rank waits wherever the host first needs a number of the GPU
    watchdog = Watchdog(ranks, timeout_s, notice, name_sample, partial(report.hung, ranks), by_stack)
    watchdog.start()
    return watchdog


def build_evaluator(config: RunConfig, data: TrainingData, settings: LoopSettings) -> Evaluator | None:
    """What evaluates during training; None where the recipe has no ``eval``."""
    if config.eval is None or data.eval is None:
        return None
    return Evaluator(data.eval, config.eval.steps, data.plan.num_steps, settings)


def build_trackers(run_dir: Path, num_steps: int, config: RunConfig, ranks: Ranks, num_done: int) -> list[Tracker]:
    """Progress bar, metrics.jsonl and what the recipe adds (``track``) on rank 0, nothing elsewhere.

    ``num_done`` steps of the run have been logged already.
    """
    return run_on_main_alone(ranks, lambda: _trackers_of_main(run_dir, num_steps, config, num_done)) or []


def _trackers_of_main(run_dir: Path, num_steps: int, config: RunConfig, num_done: int) -> list[Tracker]:
    extra = [EXTRA_TRACKERS[name](run_dir, config.name, num_done) for name in config.track]
    return [ProgressBar(num_steps, config.name, num_done), JsonlTracker(run_dir / "metrics.jsonl", num_done), *extra]


def resolve_backends(config: RunConfig, device: torch.device, ranks: Ranks) -> dict[str, Backend]:
    """What does attention, packing and splice in this run, by these names; the same on every rank."""
    dtype = DTYPES[config.train.precision]
    attention = resolve_attention(config.model.attn_implementation, device, dtype)
    splice = resolve_splice(config.model.splice, config.model.projector, device, dtype)
    return {
        "attention": attention,
        "packing": resolve_packing(config.data.packing, attention),
        "splice": agree_on_backend(splice, ranks),
    }


def agree_on_backend(backend: Backend, ranks: Ranks) -> Backend:
    """The same backend on every rank: where one cannot take what the others can, all do as that one, and say so."""
    backends = gather_objects(ranks, backend)
    if all(other.name == backends[0].name for other in backends):
        return backend
    rank = next(rank for rank, other in enumerate(backends) if other.name == "library")
    return Backend("library", f"on rank {rank}: {backends[rank].reason}")
