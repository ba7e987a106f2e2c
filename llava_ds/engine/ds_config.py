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
from llava_ds.errors import ConfigError

KNOWN_KEYS = (
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "prescale_gradients gradient_predivide_factor sparse_gradients fp16 bf16 zero_optimization "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type steps_per_print "
    "wall_clock_breakdown memory_breakdown dump_state flops_profiler activation_checkpointing comms_logger "
    "tensorboard wandb csv_monitor aio checkpoint data_types compile torch_autocast "
    "seq_parallel_communication_data_type graph_harvesting tensor_parallel zero_quantized_weights"
).split()
OWNED_BY_RECIPE = ("optimizer", "scheduler")


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON as it stands. Raises ConfigError for a missing or broken file and for unknown keys."""
    if not path.is_file():
        raise ConfigError(f"--deepspeed {path}: no such file.\n  See ds_configs/ for zero0 to zero3.")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, not an object")
    return raw


def resolve_ds_config(
    raw: dict[str, Any], train: TrainConfig, world_size: int, llm_width: int, where: str
) -> dict[str, Any]:
    """A config without any ``"auto"`` for DeepSpeed.

    Args:
        raw: the JSON as read.
        train: batch sizes, clipping and precision, which the recipe owns.
        world_size: number of ranks.
        llm_width: D, from which the ZeRO-3 bucket sizes follow, as in transformers' integration.
        where: the JSON's path, for messages.

    Raises:
        ConfigError: lists every unknown key and every disagreement between the JSON and the recipe.
    """
    problems = _unknown_keys(raw) + _batch_problems(train, world_size)
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
    sizes = {
        "reduce_bucket_size": llm_width * llm_width,
        "stage3_prefetch_bucket_size": int(0.9 * llm_width * llm_width),
        "stage3_param_persistence_threshold": 10 * llm_width,
    }
    zero = resolved.setdefault("zero_optimization", {})
    if isinstance(zero, dict):
        for key, value in sizes.items():
            if zero.get(key) == "auto":
                zero[key] = value
    problems += [f"{key}: still \"auto\", which nothing resolves; give a value" for key in _autos(resolved)]
    if problems:
        raise ConfigError(
            f"{where} does not fit the recipe, {len(problems)} problem(s):\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + '\n  Write "auto" in the JSON where the recipe decides.'
        )
    # Our optimizer is torch's AdamW: no operator is compiled, and offload works with it too.
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    resolved.setdefault("zero_allow_untested_optimizer", True)
    resolved.setdefault("steps_per_print", 10**9)
    return resolved


def zero_stage(resolved: dict[str, Any]) -> int:
    """The ZeRO stage of a config."""
    return int(resolved.get("zero_optimization", {}).get("stage", 0))


def _unknown_keys(raw: dict[str, Any]) -> list[str]:
    problems = []
    for key in raw:
        if key in OWNED_BY_RECIPE:
            problems.append(f"{key}: the recipe owns it (train.*); take it out of the JSON")
        elif key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            problems.append(f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
    return problems


def _batch_problems(train: TrainConfig, world_size: int) -> list[str]:
    if train.global_batch_size % (train.micro_batch_size * world_size) == 0:
        return []
    share = train.global_batch_size // world_size
    fitting = [n for n in range(1, share + 1) if train.global_batch_size % (n * world_size) == 0]
    return [
        f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
        f"{train.micro_batch_size} times {world_size} rank(s); micro batch sizes that fit: {fitting or 'none'}"
    ]


def _settle(resolved: dict[str, Any], path: tuple[str, ...], value: Any, source: str) -> str | None:
    """Writes the recipe's value; returns the disagreement, if there is one."""
    *parents, last = path
    node = resolved
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return f"{parent}: must be an object, got {node!r}"
    given = node.get(last, "auto")
    node[last] = value
    if given == "auto" or given == value:
        return None
    return f"{'.'.join(path)}: the JSON says {given!r}, the recipe {value!r} ({source})"


def _autos(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in _autos(value, f"{prefix}.{key}" if prefix else key)]
    return [prefix] if node == "auto" else []
