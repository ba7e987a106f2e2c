"""The trained weights of a run, over the runs that it started from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from llava_ds.checkpoint.layout import reading, resolve_step
from llava_ds.errors import CheckpointError


def read_run(step: Path) -> dict[str, Any]:
    """The run.json of a checkpoint. Raises CheckpointError when it is missing or broken."""
    with reading(step / "run.json") as file:
        return json.loads(file.read_text())


def locate_trained(path: Path) -> dict[str, Path]:
    """The file that holds each trained weight: of ``path``, then of the run that it was started from, and so on.

    A run that trained only a part (stage 1: the projector) leaves the rest to the runs before it.
    """
    located: dict[str, Path] = {}
    source: str | None = str(path)
    visited: set[Path] = set()
    while source is not None:
        step = resolve_step(Path(source))
        if step.resolve() in visited:
            raise CheckpointError(f"{step}: its model.init_from leads back to itself; start from another folder")
        visited.add(step.resolve())
        with reading(step / "trainable.safetensors") as file, safe_open(file, "pt") as weights:
            for name in weights.keys():
                located.setdefault(name, file)
        source = read_run(step)["config"]["model"]["init_from"]
    return located


def apply_trained(
    model: nn.Module, located: dict[str, Path], copy: Callable[[nn.Parameter, torch.Tensor], None]
) -> None:
    """Copies trained weights into a model, one at a time, with ``copy`` (which knows about partitioned parameters).

    Raises CheckpointError that lists every unknown name and every differing shape.
    """
    parameters = dict(model.named_parameters())
    problems = []
    for name, file in located.items():
        if name not in parameters:
            problems.append(f"{name}: the model has no such parameter")
            continue
        expected = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
        with safe_open(file, "pt") as weights:
            shape = tuple(weights.get_slice(name).get_shape())
        if shape != expected:
            problems.append(f"{name}: {shape} in {file}, {expected} in the model")
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit the model; use the model settings of its run:\n  " + "\n  ".join(problems[:20])
        )
    for name, file in located.items():
        with safe_open(file, "pt") as weights:
            copy(parameters[name], weights.get_tensor(name))
