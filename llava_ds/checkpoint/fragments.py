"""A step's shards: every rank writes the stretches of the trained parameters that are its own, and whoever reads them
puts together what it needs. So a checkpoint belongs to no number of ranks and to no ZeRO stage.

``weights-00001-of-00004.safetensors`` holds 1-D tensors ``<parameter>@<start>``: the fp32 weights of the flattened
parameter from ``start`` on. ``optimizer-...`` holds ``<state>/<parameter>@<start>``, e.g. AdamW's ``exp_avg``.
``step.json`` holds the parameters' shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_ds.checkpoint.layout import reading
from llava_ds.checkpoint.lazy import LazyTensor, concatenated, in_memory
from llava_ds.checkpoint.tensor_files import open_safetensors, read_safetensors_header
from llava_ds.errors import CheckpointError

STEP_FILE = "step.json"
STEPS_KEY = "optimizer_steps"
"""In an optimizer shard's metadata: how many steps were taken on each parameter, as JSON."""


@dataclass(frozen=True)
class Fragment:
    """A stretch of a flattened parameter that one rank keeps: 1-D fp32 tensors of equal length.

    ``states`` are the optimizer's, by its names; empty before its first step.
    """

    parameter: str
    start: int
    weight: torch.Tensor
    states: Mapping[str, torch.Tensor]


def shard_names(rank: int, world_size: int) -> tuple[str, str]:
    """The two files of a rank: weights and optimizer states."""
    suffix = f"{rank:05d}-of-{world_size:05d}.safetensors"
    return f"weights-{suffix}", f"optimizer-{suffix}"


def shard_tensors(
    fragments: Sequence[Fragment],
) -> tuple[list[tuple[str, LazyTensor]], list[tuple[str, LazyTensor]]]:
    """What goes into the two files of a rank."""
    weights = [(f"{f.parameter}@{f.start}", in_memory(f.weight)) for f in fragments]
    states = [
        (f"{state}/{f.parameter}@{f.start}", in_memory(value)) for f in fragments for state, value in f.states.items()
    ]
    return weights, states


def open_weights(step: Path) -> dict[str, LazyTensor]:
    """Every trained parameter of a step, whole, in fp32.

    Raises CheckpointError when a shard is damaged, or a stretch of a parameter is missing or stands twice.
    """
    return _join(step, "weights", read_shapes(step))


def open_optimizer(step: Path) -> dict[str, LazyTensor]:
    """Every optimizer state of a step, ``<state>/<parameter>``; empty before the first optimizer step.

    Raises CheckpointError as ``open_weights`` does.
    """
    return _join(step, "optimizer", read_shapes(step))


def read_optimizer_steps(step: Path) -> dict[str, int]:
    """How many steps the optimizer took on each parameter; empty before its first."""
    steps: dict[str, int] = {}
    for file in sorted(step.glob("optimizer-*-of-*.safetensors")):
        with reading(file):
            steps |= json.loads(read_safetensors_header(file)[0]["__metadata__"][STEPS_KEY])
    return steps


def read_shapes(step: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every trained parameter of a step, in the model's order."""
    with reading(step / STEP_FILE) as file:
        return {name: tuple(shape) for name, shape in json.loads(file.read_text())["parameters"].items()}


def _join(step: Path, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    stretches: dict[str, list[tuple[int, LazyTensor]]] = {}
    for file in sorted(step.glob(f"{kind}-*-of-*.safetensors")):
        for key, tensor in open_safetensors(file).items():
            name, _, start = key.rpartition("@")
            if not start.isdigit():
                raise CheckpointError(f"{file}: {key!r} is not of the form <parameter>@<start>; it is no shard of ours")
            stretches.setdefault(name, []).append((int(start), tensor))
    if kind == "weights":
        stretches = {name: stretches.get(name, []) for name in shapes} | stretches
    joined = {}
    for name, parts in stretches.items():
        parameter = name.rpartition("/")[2]
        if parameter not in shapes:
            raise CheckpointError(f"{step}: a shard holds {name}, which {STEP_FILE} does not name")
        joined[name] = _join_one(step, name, sorted(parts, key=lambda part: part[0]), shapes[parameter])
    return joined


def _join_one(step: Path, name: str, parts: Sequence[tuple[int, LazyTensor]], shape: tuple[int, ...]) -> LazyTensor:
    end = 0
    for start, tensor in parts:
        if start != end:
            what = "missing" if start > end else "there twice"
            raise CheckpointError(
                f"{step}: elements {min(start, end)} to {max(start, end)} of {name} are {what}; a shard is not of this "
                "checkpoint"
            )
        end += tensor.numel
    numel = torch.Size(shape).numel()
    if end != numel:
        raise CheckpointError(f"{step}: {name} has {end} of {numel} elements; a shard is missing")
    return concatenated([tensor for _, tensor in parts], shape)
