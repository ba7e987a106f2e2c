"""What a rank keeps of the trained parameters and their optimizer's state, under every ZeRO stage.

DeepSpeed divides them in three ways: not at all (stage 0), all parameters of a group laid end to end and cut (stages 1
and 2), every parameter by itself (stage 3). Here each becomes the same: stretches of flattened parameters, as live
views of the fp32 tensors that the optimizer updates. So a checkpoint belongs to no stage and to no number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llava_ds.checkpoint.fragments import Fragment
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.distributed import Ranks
from llava_ds.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Place:
    """``length`` elements of a flattened parameter from ``start`` on lie in the flattened ``owner`` from ``offset`` on.

    ``owner`` is the fp32 tensor that the optimizer updates: its state is kept by that.
    """

    parameter: str
    start: int
    owner: torch.Tensor
    offset: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stretch of a tensor of the owner's shape: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def held_places(engine: Any) -> list[Place]:
    """Every stretch of a trained parameter whose fp32 weight this rank holds.

    Raises ConfigError for an optimizer of DeepSpeed that this does not know.
    """
    names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        places = _stage_3(optimizer, names)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        places = _stages_1_and_2(optimizer, names)
    elif hasattr(optimizer, "fp16_groups") and hasattr(optimizer, "fp32_groups"):
        places = _stage_0_of_16_bit(optimizer, names)
    elif isinstance(optimizer, torch.optim.Optimizer):
        groups = optimizer.param_groups
        places = (Place(names[id(p)], 0, p, 0, p.numel()) for group in groups for p in group["params"])
    else:
        raise ConfigError(
            f"DeepSpeed chose the optimizer {type(optimizer).__name__}, whose state cannot be saved here.\n"
            "  Take one of ds_configs/, or leave the keys out that these do not have (data_types, torch_autocast, ...)."
        )
    return [place for place in places if place.length > 0]


def own_places(engine: Any, ranks: Ranks) -> list[Place]:
    """The stretches that this rank saves: what it holds, or its share of that where every rank holds everything."""
    places = held_places(engine)
    is_divided = hasattr(engine.optimizer, "fp32_partitioned_groups_flat") or hasattr(
        engine.optimizer, "single_partition_of_fp32_groups"
    )
    return places if is_divided else list(_share(places, ranks))


def _stage_3(optimizer: Any, names: Mapping[int, str]) -> Iterator[Place]:
    for group in optimizer.fp16_groups:
        for parameter in group:
            number, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank(group=parameter.ds_process_group) * length
            owner = optimizer.fp32_partitioned_groups_flat[number]
            # The last partitions may be padded, or be nothing but padding.
            yield Place(names[id(parameter)], start, owner, offset, min(length, parameter.ds_numel - start))


def _stages_1_and_2(optimizer: Any, names: Mapping[int, str]) -> Iterator[Place]:
    # Not by DeepSpeed's own map (_hp_mapping): with round_robin_gradients that is of another order than the buffer.
    groups = zip(
        optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets,
        optimizer.single_partition_of_fp32_groups, optimizer.real_dp_process_group, strict=True,
    )
    for parameters, offsets, owner, group in groups:
        begin = dist.get_rank(group=group) * owner.numel()
        for parameter, offset in zip(parameters, offsets, strict=True):
            first, last = max(offset, begin), min(offset + parameter.numel(), begin + owner.numel())
            if first < last:
                yield Place(names[id(parameter)], first - offset, owner, first - begin, last - first)


def _stage_0_of_16_bit(optimizer: Any, names: Mapping[int, str]) -> Iterator[Place]:
    for group, owners in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, owner in zip(group, owners, strict=True):
            yield Place(names[id(parameter)], 0, owner, 0, owner.numel())


def _share(places: list[Place], ranks: Ranks) -> Iterator[Place]:
    """A rank's even share of whole parameters laid end to end."""
    total = sum(place.length for place in places)
    begin, end = total * ranks.rank // ranks.world_size, total * (ranks.rank + 1) // ranks.world_size
    position = 0
    for place in places:
        first, last = max(begin - position, 0), min(end - position, place.length)
        if first < last:
            yield Place(place.parameter, first, place.owner, first, last - first)
        position += place.length


def find_misplaced(engine: Any, places: list[Place]) -> list[str]:
    """Parameters whose fp32 weights are not what the model computes with, before training: where ``places`` are wrong.

    Every option of DeepSpeed may lay its buffers out in another way; this sees it before anything is saved.
    """
    parameters = dict(engine.module.named_parameters())
    wrong = []
    for place in places:
        parameter = parameters[place.parameter]
        if hasattr(parameter, "ds_tensor"):  # this rank's partition; places of stage 3 begin where it does
            own = parameter.ds_tensor.detach().view(-1)[: place.length]
        else:
            own = parameter.detach().view(-1)[place.start : place.start + place.length]
        if not torch.equal(place.of(place.owner).to(own.device, own.dtype), own):
            wrong.append(place.parameter)
    return sorted(set(wrong))


def live_fragments(engine: Any, places: list[Place]) -> list[Fragment]:
    """The stretches with their optimizer states, as views that the next optimizer step changes."""
    fragments = []
    for place in places:
        states = {
            name: place.of(value)
            for name, value in _state_of(engine, place.owner).items()
            if isinstance(value, torch.Tensor) and value.numel() == place.owner.numel() and name != "step"
        }
        fragments.append(Fragment(place.parameter, place.start, place.of(place.owner), states))
    return fragments


def optimizer_steps(engine: Any, places: list[Place]) -> dict[str, int]:
    """How many steps the optimizer took on each parameter; empty before its first."""
    steps = {place.parameter: _state_of(engine, place.owner).get("step") for place in places}
    return {name: int(step) for name, step in steps.items() if step is not None}


def restore(
    engine: Any,
    places: list[Place],
    weights: Mapping[str, LazyTensor],
    states: Mapping[str, LazyTensor],
    steps: Mapping[str, int],
) -> None:
    """Puts saved weights and optimizer states (``<state>/<parameter>``) into their places, a piece at a time.

    Raises CheckpointError that lists the parameters which the checkpoint lacks, or has in another size.
    """
    kinds = sorted({key.partition("/")[0] for key in states})
    problems = []
    for name in dict.fromkeys(place.parameter for place in places):
        wanted = [f"{kind}/{name}" for kind in kinds] if name in steps else []
        missing = [key for key in wanted if key not in states] + [name] * (name not in weights)
        problems += [f"{key}: not in the checkpoint" for key in missing]
    if problems:
        raise CheckpointError("the checkpoint does not hold what trains here:\n  " + "\n  ".join(problems[:20]))
    for place in places:
        _fill(place.of(place.owner), weights[place.parameter], place.start)
        if place.parameter not in steps:
            continue
        state = _base_optimizer(engine).state[place.owner]
        state["step"] = torch.tensor(float(steps[place.parameter]))
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(place.owner, dtype=states[f"{kind}/{place.parameter}"].dtype)
            _fill(place.of(state[kind]), states[f"{kind}/{place.parameter}"], place.start)


def _fill(target: torch.Tensor, source: LazyTensor, start: int) -> None:
    step = 1 << 22
    for begin in range(0, target.numel(), step):
        end = min(target.numel(), begin + step)
        target[begin:end].copy_(source.read(start + begin, start + end))


def _base_optimizer(engine: Any) -> Any:
    """torch's own optimizer, inside DeepSpeed's where there is one."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _state_of(engine: Any, owner: torch.Tensor) -> Mapping[str, Any]:
    """The optimizer's state of a tensor; looking for it makes none."""
    return _base_optimizer(engine).state.get(owner, {})
