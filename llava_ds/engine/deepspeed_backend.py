"""The one import site of DeepSpeed."""

from __future__ import annotations

import logging
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from llava_ds.checkpoint.lazy import LazyTensor


def check_ds_config(ds_config: dict[str, Any]) -> list[str]:
    """What DeepSpeed's own reader says against a config, as ``key: reason``; needs no process group.

    ZeRO's settings are read first, all at once: of the other groups it names the first wrong one only.
    """
    # Outside a process group DeepSpeed takes one rank for granted; batch sizes are checked elsewhere.
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    batch = num_ranks * ds_config["train_micro_batch_size_per_gpu"]
    alone = {"train_batch_size": batch, "gradient_accumulation_steps": 1}
    try:
        prefix = "zero_optimization."
        DeepSpeedZeroConfig(**ds_config["zero_optimization"])
        prefix = ""
        deepspeed.DeepSpeedConfig({**ds_config, **alone})
    except ValidationError as error:
        group = prefix or f"{error.title}: "
        return [
            f"{group}{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        ]
    except Exception as error:  # its reader raises whatever a wrong value leads to
        return [f"{prefix or 'DeepSpeed'}: {type(error).__name__}: {error}"]
    return []


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a config."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def init_distributed(device: torch.device, timeout_s: float = 1800) -> None:
    """Joins the process group of the launcher's environment (NCCL on GPUs, gloo on CPUs)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch by old names, and torch says so at every collective.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Otherwise DeepSpeed compiles a shared-memory operator for about a minute, and fails without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout_s), verbose=False)


def hold_partitioned_construction(ds_config: dict[str, Any]) -> HfDeepSpeedConfig | None:
    """Lets transformers build and load models partitioned while the returned object is alive.

    Hold it in a variable until training ends: transformers keeps a weak reference only. None below ZeRO-3.
    """
    return HfDeepSpeedConfig(ds_config) if zero_stage(ds_config) == 3 else None


def initialize_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, ds_config: dict[str, Any]
) -> Any:
    """A DeepSpeed engine around the model."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    if zero_stage(ds_config) == 3:
        _register_external_parameters(engine.module)
    if zero_stage(ds_config) == 0:
        # DeepSpeed's 16-bit optimizer took a step on zero gradients, which Adam would count as one.
        optimizer.state.clear()
    return engine


def _register_external_parameters(model: nn.Module) -> None:
    """Has ZeRO-3 gather the weights of other modules that a module says it reads, around that module alone.

    After ``deepspeed.initialize``, which may put other modules into the model; before the first forward pass, whose
    order of weights DeepSpeed keeps.
    """
    for module in model.modules():
        external_parameters = getattr(module, "external_parameters", None)
        for parameter in external_parameters() if external_parameters else ():
            deepspeed.zero.register_external_parameter(module, parameter)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where it is partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def load_full_parameter(parameter: nn.Parameter, value: LazyTensor, is_main: bool) -> None:
    """Copies a whole value into a parameter. Of one that is partitioned rank 0 alone reads it: the others get it."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        if is_main or not hasattr(parameter, "ds_shape"):
            parameter.copy_(value.whole())
