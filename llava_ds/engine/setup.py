"""Small decisions at the start of a run: device, precision, trackers, initial weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from llava_ds.checkpoint.trained import apply_trained, locate_trained
from llava_ds.config import RunConfig
from llava_ds.distributed import Ranks, gather_objects
from llava_ds.engine.deepspeed_backend import load_full_parameter
from llava_ds.engine.loop import Tracker
from llava_ds.errors import ConfigError
from llava_ds.metrics.trackers import EXTRA_TRACKERS, JsonlTracker, ProgressBar
from llava_ds.models.build import DTYPES, Backend, resolve_attention, resolve_packing, resolve_splice


def select_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU where there is none (or ``DS_ACCELERATOR=cpu`` asks for it)."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def load_initial_weights(model: nn.Module, init_from: str | None, run_dir: Path, ranks: Ranks) -> dict[str, Path]:
    """Loads what the run ``init_from`` trained, one weight at a time; returns the file of each.

    Raises:
        CheckpointError: there is none, or it does not fit.
        ConfigError: it lies in the folder that this run is about to take.
    """
    if init_from is None:
        return {}
    located = locate_trained(Path(init_from))
    if any(run_dir.resolve() in file.resolve().parents for file in located.values()):
        raise ConfigError(
            f"model.init_from={init_from!r} lies in {run_dir}, which this run would set aside; give another --run-dir"
        )
    apply_trained(model, located, lambda p, value: load_full_parameter(p, value, ranks.is_main))
    return located


def build_trackers(run_dir: Path, num_steps: int, config: RunConfig, ranks: Ranks) -> list[Tracker]:
    """Progress bar, metrics.jsonl and what the recipe adds (``track``) on rank 0, nothing elsewhere."""
    if not ranks.is_main:
        return []
    extra = [EXTRA_TRACKERS[name](run_dir, config.name) for name in config.track]
    return [ProgressBar(num_steps, config.name), JsonlTracker(run_dir / "metrics.jsonl"), *extra]


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
