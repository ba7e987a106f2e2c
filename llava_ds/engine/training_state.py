"""Where training stands, and how that goes into a checkpoint and back into an engine."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from llava_ds.data.sampler import START, DataState

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class Progress:
    """Where training stands after a step."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    loss: float = float("nan")
    bad_samples: int = 0
    """Samples seen whose picture was bad (``data.on_bad_sample=skip``)."""
    data_state: DataState = START
    """Where the data goes on after this step."""


def describe_state(engine: Any, progress: Progress) -> dict[str, Any]:
    """Plain data of where training stands."""
    scheduler = engine.lr_scheduler.state_dict()
    scaler = _loss_scaler(engine) if engine.fp16_enabled() else None
    return {
        # Before the first step there is no loss, and NaN is no JSON.
        "progress": asdict(progress) | {"loss": progress.loss if math.isfinite(progress.loss) else None},
        # The functions of the schedule are made anew from the recipe.
        "schedule": {key: value for key, value in scheduler.items() if key != "lr_lambdas"},
        "loss_scale": {key: getattr(scaler, key) for key in _SCALE if hasattr(scaler, key)},
        "engine": {key: getattr(engine, key) for key in _COUNTERS},
    }


def read_progress(state: dict[str, Any]) -> Progress:
    """The progress that ``describe_state`` wrote."""
    raw = state["progress"]
    loss = float("nan") if raw["loss"] is None else raw["loss"]
    return Progress(**{**raw, "loss": loss, "data_state": DataState(**raw["data_state"])})


def apply_state(engine: Any, state: dict[str, Any]) -> None:
    """Puts schedule, learning rates, counters and (in fp16) loss scale back."""
    engine.lr_scheduler.load_state_dict({**engine.lr_scheduler.state_dict(), **state["schedule"]})
    for group, rate in zip(engine.optimizer.param_groups, state["schedule"]["_last_lr"], strict=True):
        group["lr"] = rate
    scaler = _loss_scaler(engine)
    for key, value in state["loss_scale"].items():
        if hasattr(scaler, key):  # stage 0 keeps fewer of them
            setattr(scaler, key, value)
    for key, value in state["engine"].items():
        setattr(engine, key, value)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers inside the model (dropout) are a function of (seed, step, rank): there is no state to keep."""
    word = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
    torch.manual_seed(word)
    random.seed(word)
    np.random.seed(word % 2**32)


def _loss_scaler(engine: Any) -> Any:
    """DeepSpeed's keeper of the loss scale, which stage 0 calls by another name; None in fp32 at stage 0."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
