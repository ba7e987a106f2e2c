"""The trained weights of a run, over the runs that it started from."""

from __future__ import annotations

import hashlib
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
    """The file that holds each trained weight: of ``path``, and what it left as the run that it started from had it.

    A run that trained only a part (stage 1: the projector) needs the files that its run.json names for the rest.

    Raises CheckpointError when one of them is missing, or is not the file that the run started from.
    """
    step = resolve_step(path)
    own = step / "trainable.safetensors"
    with reading(own), safe_open(own, "pt") as weights:
        located = dict.fromkeys(weights.keys(), own)
    initial = read_run(step)["initial_weights"]
    inherited = {name: Path(file) for name, file in initial["weights"].items() if name not in located}
    for file in sorted(set(inherited.values())):
        _check_unchanged(file, initial["sha256"][str(file)], step)
    return located | inherited


def describe_initial_weights(located: dict[str, Path]) -> dict[str, Any]:
    """What run.json keeps of the weights that a run starts from: ``weights`` (file by name) and ``sha256`` by file."""
    files = {name: str(file.resolve()) for name, file in located.items()}
    return {"weights": files, "sha256": {file: _sha256(Path(file)) for file in sorted(set(files.values()))}}


def _check_unchanged(file: Path, expected: str, step: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{step} needs the weights that it started from, but {file} is gone; put it back")
    found = _sha256(file)
    if found != expected:
        raise CheckpointError(
            f"{step} started from other weights than {file} holds now: sha256 {expected[:16]} expected, {found[:16]} "
            "found.\n  Did a later run take its folder? The earlier one then stands beside it, with a number."
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with reading(file), file.open("rb") as handle:
        while block := handle.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


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
