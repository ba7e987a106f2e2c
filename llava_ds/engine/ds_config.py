"""The DeepSpeed JSON: its ``"auto"`` values resolved against the recipe, disagreements raised once, all together.

DeepSpeed itself ignores unknown top-level keys, reads ``"auto"`` precision as off and clips at 1.0 when silent;
here every one of these is resolved or refused.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from llava_ds.config import TrainConfig
from llava_ds.engine.deepspeed_backend import check_ds_config
from llava_ds.errors import ConfigError

KNOWN_KEYS = (
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "prescale_gradients gradient_predivide_factor sparse_gradients fp16 bf16 zero_optimization "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type steps_per_print "
    "wall_clock_breakdown memory_breakdown dump_state flops_profiler activation_checkpointing comms_logger "
    "tensorboard wandb csv_monitor aio checkpoint data_types compile torch_autocast "
    "seq_parallel_communication_data_type graph_harvesting tensor_parallel"
).split()
GROUPS = (
    "fp16 bf16 zero_optimization flops_profiler activation_checkpointing comms_logger tensorboard wandb csv_monitor "
    "aio checkpoint data_types compile torch_autocast tensor_parallel"
).split()
OWNED_BY_RECIPE = ("optimizer", "scheduler")


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON as it stands. Raises ConfigError for a missing or broken file and for a key that stands twice."""
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    if not path.is_file():
        raise ConfigError(f"--deepspeed {path}: no such file.\n  See ds_configs/ for zero0 to zero3.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=collect)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}\n  Give a DeepSpeed JSON, e.g. of ds_configs/.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, not an object")
    if twice:
        raise ConfigError(f"{path}: {', '.join(map(repr, twice))}: stands twice in one object; keep one of each")
    return raw


def resolve_ds_config(raw: dict[str, Any], train: TrainConfig, world_size: int, where: str) -> dict[str, Any]:
    """A config for DeepSpeed, checked and without any ``"auto"`` but those of ``fill_bucket_sizes``.

    Args:
        raw: the JSON as read.
        train: batch sizes (see ``resolve_micro_batch``), clipping and precision, which the recipe owns.
        world_size: number of ranks.
        where: the JSON's path, for messages.

    Raises:
        ConfigError: lists every unknown key, every disagreement with the recipe and what DeepSpeed refuses.
    """
    problems = _unknown_keys(raw)
    no_groups = [key for key in GROUPS if not isinstance(raw.get(key, {}), dict)]
    if no_groups:  # nothing below can look into them
        raise _refusal(where, problems + [f"{key}: must be an object, got {raw[key]!r}" for key in no_groups])
    resolved = json.loads(json.dumps(raw))
    accumulation = train.global_batch_size // (train.micro_batch_size * world_size)
    values: list[tuple[tuple[str, ...], Any, str]] = [
        (("train_batch_size",), train.global_batch_size, "train.global_batch_size"),
        (("train_micro_batch_size_per_gpu",), train.micro_batch_size, "train.micro_batch_size"),
        (("gradient_accumulation_steps",), accumulation, "train.global_batch_size / (micro_batch_size * ranks)"),
        (("gradient_clipping",), train.gradient_clipping, "train.gradient_clipping"),
        (("bf16", "enabled"), train.precision == "bf16", f"train.precision={train.precision}"),
        (("fp16", "enabled"), train.precision == "fp16", f"train.precision={train.precision}"),
    ]
    for path, value, source in values:
        problem = _settle(resolved, path, value, source)
        if problem:
            problems.append(problem)
    resolved.setdefault("zero_optimization", {})
    filled_later = [f"zero_optimization.{key}" for key in _bucket_sizes(0)]
    problems += [
        f"{key}: still \"auto\", which nothing resolves; give a value"
        for key in _autos(resolved)
        if key not in filled_later
    ]
    zero = resolved["zero_optimization"]
    if train.micro_batch_tokens and accumulation == 1 and zero.get("stage") in (1, 2) and zero.get("offload_optimizer"):
        # DeepSpeed 0.19 decides by the stated number whether offloaded gradients of micro-batches are added up.
        problems.append(
            f"zero_optimization.offload_optimizer: with stage {zero['stage']} and train.micro_batch_tokens, let a step "
            "have at least two micro-batches (lower train.micro_batch_size), or take stage 3"
        )
    problems += _not_saved(zero)
    problems += check_ds_config({key: value for key, value in resolved.items() if key in KNOWN_KEYS})
    if problems:
        raise _refusal(where, problems)
    # Our optimizer is torch's AdamW: no operator is compiled, and offload works with it too.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    resolved.setdefault("zero_allow_untested_optimizer", True)
    resolved.setdefault("steps_per_print", 10**9)
    return resolved


def fill_bucket_sizes(ds_config: dict[str, Any], llm_width: int) -> None:
    """Fills ZeRO's ``"auto"`` sizes from D, as transformers' integration does."""
    zero = ds_config["zero_optimization"]
    zero.update({key: size for key, size in _bucket_sizes(llm_width).items() if zero.get(key) == "auto"})


def _bucket_sizes(llm_width: int) -> dict[str, int]:
    return {
        "reduce_bucket_size": llm_width * llm_width,
        "stage3_prefetch_bucket_size": int(0.9 * llm_width * llm_width),
        "stage3_param_persistence_threshold": 10 * llm_width,
    }


def _refusal(where: str, problems: list[str]) -> ConfigError:
    return ConfigError(
        f"{where} does not fit, {len(problems)} problem(s):\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + '\n  Write "auto" in the JSON where the recipe decides.'
    )


def _not_saved(zero: dict[str, Any]) -> list[str]:
    """Settings under which part of the optimizer lies where checkpoints do not look for it."""
    problems = []
    for group in ("offload_optimizer", "offload_param"):
        offload = zero.get(group) or {}
        if not isinstance(offload, dict):
            continue  # DeepSpeed's reader says so
        if offload.get("device") == "nvme":
            problems.append(f"zero_optimization.{group}.device: 'nvme' has no checkpoints here; use 'cpu' or none")
        for key in ("ratio", "super_offload"):
            if offload.get(key) not in (None, 1, False):
                problems.append(
                    f"zero_optimization.{group}.{key}: {offload[key]!r} has no checkpoints here; take it out"
                )
    if zero.get("zenflow"):
        problems.append("zero_optimization.zenflow: has no checkpoints here; take it out")
    return problems


def _unknown_keys(raw: dict[str, Any]) -> list[str]:
    problems = []
    for key in raw:
        if key in OWNED_BY_RECIPE:
            problems.append(f"{key}: the recipe owns it (train.*); take it out of the JSON")
        elif key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            problems.append(f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
    return problems


def _settle(resolved: dict[str, Any], path: tuple[str, ...], value: Any, source: str) -> str | None:
    """Writes the recipe's value; returns the disagreement, if there is one."""
    *parents, last = path
    node = resolved
    for parent in parents:
        node = node.setdefault(parent, {})
    given = node.get(last, "auto")
    node[last] = value
    if given == "auto" or given == value:
        return None
    return f"{'.'.join(path)}: the JSON says {given!r}, the recipe {value!r} ({source})"


def _autos(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in _autos(value, f"{prefix}.{key}" if prefix else key)]
    return [prefix] if node == "auto" else []
