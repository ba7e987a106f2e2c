"""AdamW over parameter groups, and the learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from llava_ds.config import TrainConfig
from llava_ds.errors import ConfigError


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """torch's AdamW; the projector may have its own rate, biases and norms never decay.

    Raises ConfigError when nothing trains.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    norms = _norm_parameters(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own_rate = name.startswith("projector.") and train.projector_learning_rate is not None
        rate = train.projector_learning_rate if own_rate and train.projector_learning_rate else train.learning_rate
        decays = not (name.endswith("bias") or name in norms)
        groups.setdefault((rate, train.weight_decay if decays else 0.0), []).append(parameter)
    if not groups:
        raise ConfigError(f"train.trainable={train.trainable} leaves nothing to train")
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        betas=train.adam_betas,
        eps=train.adam_eps,
    )


def _norm_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of normalisations: of modules whose class says so, whatever a model calls them."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }


def build_scheduler(
    optimizer: torch.optim.Optimizer, train: TrainConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then the half cosine to 0 (or constant), over optimizer steps.

    The first step has rate 0, as in the official runs.
    """
    warmup = math.ceil(num_steps * train.warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if train.lr_schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, num_steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
