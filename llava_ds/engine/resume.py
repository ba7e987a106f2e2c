"""Going on with a run: which step is whole, and whether what is about to start is the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.fragments import STEP_FILE, open_optimizer, open_weights, read_optimizer_steps
from llava_ds.checkpoint.layout import (
    checkpoints_dir,
    find_damage,
    list_step_folders,
    list_steps,
    read_manifest,
    reading,
    step_dir,
    step_number,
)
from llava_ds.checkpoint.sources import describe_sources, hash_of
from llava_ds.config import RunConfig, parse_config
from llava_ds.constants import COMPLETE_MARKER
from llava_ds.distributed import Ranks, gather_objects, run_on_main
from llava_ds.engine.optimizer_state import held_places, restore
from llava_ds.engine.training_state import Progress, apply_state, read_progress
from llava_ds.errors import CheckpointError, ConfigError

# What may be another when a run goes on: it changes neither the samples nor the steps. Data and weights may lie
# elsewhere; that they are the same is seen by their contents.
_MAY_CHANGE = {
    "name", "prepare", "next_command", "track",
    "model.vision_tower", "model.vision_pretrained", "model.llm", "model.attn_implementation", "model.splice",
    "model.gradient_checkpointing",
    "data.path", "data.image_root", "data.mixture.path", "data.mixture.image_root", "data.num_workers",
    "data.feature_cache", "data.max_bad_frac", "data.packing", "eval.path", "eval.image_root",
    "train.micro_batch_size", "train.micro_batch_tokens", "train.save_steps", "train.keep_last", "train.keep_every",
    "train.trial_save", "train.save_in_background", "train.hang_timeout_s",
}


TRIAL_PREFIX = "trial-"
"""Of folders in which an export is tried."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run goes on from: its folder, run.json, step.json, and where training stands there."""

    folder: Path
    run: dict[str, Any]
    state: dict[str, Any]
    progress: Progress


def resume_point(
    run_dir: Path, asked: str | None, config: RunConfig, packing: str, ranks: Ranks
) -> ResumePoint | None:
    """Where the run in a folder goes on: None without ``--resume``, or where there is no checkpoint. Collective.

    ``asked`` is what ``--resume`` says: ``last``, or the number of a step. ``packing`` is what it will be now.

    Raises CheckpointError when there is no whole checkpoint to go on from, ConfigError when it is of another run.
    """
    if asked is None:
        return None
    if asked != "last" and not (asked.isascii() and asked.isdecimal()):
        raise ConfigError(f"--resume {asked}: give the number of a step, or nothing for the last good checkpoint")
    log = print if ranks.is_main else _silent
    point = find_resume_point(run_dir, None if asked == "last" else int(asked), ranks, log)
    if point is None:
        log(f"--resume: {run_dir} has no checkpoint yet; the run starts at its beginning")
        return None
    run_on_main(ranks, lambda: check_same_run(point, config, packing, ranks))
    return point


def _silent(_: str) -> None:
    """Rank 0 says it for all."""


def find_resume_point(
    run_dir: Path, step: int | None, ranks: Ranks, log: Callable[[str], None] = print
) -> ResumePoint | None:
    """The last whole checkpoint of a run, or that of ``step``; None where the run has none. Collective.

    Every file is read once, shared out over the ranks, and compared with what was written. A damaged checkpoint is
    named, and the one before it is taken.

    Raises CheckpointError on every rank when ``step`` is not there or damaged, or no checkpoint is whole.
    """
    candidates = run_on_main(ranks, lambda: _candidates(run_dir, step))
    damage: list[str] = []
    for folder in candidates:
        problems = _find_damage(folder, run_dir, ranks)
        if not problems:
            for problem in damage:
                log(f"damaged, left aside: {problem}")
            return _read_point(folder)
        damage += problems
    if candidates:
        raise CheckpointError(
            f"{run_dir} has no whole checkpoint{'' if step is None else f' of step {step}'}:\n  "
            + "\n  ".join(damage)
            + "\n  Copy the files again, or resume from another step; without --resume the run starts anew.",
            on_every_rank=True,
        )
    return None


def _candidates(run_dir: Path, step: int | None) -> list[Path]:
    """Complete checkpoints, the newest first."""
    steps = list_steps(run_dir)[::-1]
    if step is None:
        return steps
    if step_dir(run_dir, step) not in steps:
        there = ", ".join(str(step_number(folder)) for folder in steps[::-1]) or "none"
        raise CheckpointError(f"--resume {step}: {run_dir} has no complete checkpoint of that step; complete: {there}")
    return [step_dir(run_dir, step)]


def _find_damage(folder: Path, run_dir: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint, on every rank; each looks at a share of its files."""

    def look() -> tuple[list[str], list[str]]:
        try:
            names = sorted(read_manifest(folder))
            return names, _foreign(folder, run_dir)
        except CheckpointError as error:
            return [], [str(error)]

    names, problems = run_on_main(ranks, look)
    found = find_damage(folder, names[ranks.rank :: ranks.world_size]) if names else []
    return problems + [problem for share in gather_objects(ranks, found) for problem in share]


def _foreign(folder: Path, run_dir: Path) -> list[str]:
    """A checkpoint of another run, copied into this one's folder."""
    with reading(folder / "run.json") as file:
        of_step = json.loads(file.read_text())["run_id"]
    try:
        of_run = json.loads((run_dir / "run.json").read_text())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # it is gone or broken, and is written anew from here
    return [] if of_step == of_run else [f"{folder} is of the run {of_step}, and {run_dir} is of {of_run}"]


def _read_point(folder: Path) -> ResumePoint:
    with reading(folder / "run.json") as file:
        run = json.loads(file.read_text())
    with reading(folder / STEP_FILE) as file:
        state = json.loads(file.read_text())
        progress = read_progress(state)
    return ResumePoint(folder, run, state, progress)


def check_same_run(point: ResumePoint, config: RunConfig, packing: str, ranks: Ranks) -> None:
    """Raises ConfigError that lists every setting which differs from the run's and may not."""
    before = parse_config(point.run["config"], where=f"{point.folder / 'run.json'}, of another version")
    old, new = dict(_flatten(before.model_dump())), dict(_flatten(config.model_dump()))
    problems = [
        f"{key}: {old.get(key)!r} in the run, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and _without_numbers(key) not in _MAY_CHANGE
    ]
    sizes = [
        (one.train.micro_batch_size, one.train.micro_batch_tokens, world_size, name)
        for one, world_size, name in (
            (before, point.state["world_size"], point.run["packing"]["name"]), (config, ranks.world_size, packing)
        )
    ]
    if config.train.loss_averaging == "per_micro_batch" and sizes[0] != sizes[1]:
        names = "train.micro_batch_size, train.micro_batch_tokens, ranks, packing"
        problems.append(
            f"{names}: {sizes[0]} in the run, {sizes[1]} now; train.loss_averaging=per_micro_batch needs them unchanged"
        )
    held_out = (point.run.get("eval") or {}).get("data")
    old_entries = [*point.run["data"], *([held_out] if held_out else [])]
    for (_, entry), old_entry in zip(config.named_sources(), old_entries, strict=False):
        hashes = (old_entry["xxh128"], hash_data(entry.path))
        if hashes[0] != hashes[1]:
            problems.append(f"{entry.path}: xxh128 {str(hashes[0])[:16]} in the run, {str(hashes[1])[:16]} now")
    sources = describe_sources(config.model, config.seed)
    problems += _changed_sources(point.run["sources"], sources, config.train.trainable)
    if problems:
        raise ConfigError(
            f"{point.folder} cannot go on with these settings, {len(problems)} problem(s):\n  "
            + "\n  ".join(problems)
            + "\n  Set them back, or start a new run from its weights with model.init_from."
        )


def hash_data(path: str) -> str | None:
    """The xxh128 of a data set that is one file; None for a folder or a URL, whose samples' lengths must do."""
    return hash_of(Path(path)) if Path(path).is_file() else None


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else None
    if pairs is None:
        yield prefix, node
        return
    for key, value in pairs:
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _without_numbers(key: str) -> str:
    """``data.mixture.0.path`` -> ``data.mixture.path``."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def _changed_sources(old: Mapping[str, Any], new: Mapping[str, Any], trainable: list[Any]) -> Iterator[str]:
    """Frozen weights and configs that are other files than the run's, wherever they lie."""
    for part in sorted(old):
        before, now = (_hashes(source[part], part in trainable) for source in (old, new))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                shown = [str(value)[:16] for value in (before.get(name), now.get(name))]
                yield f"model.{part}: {name} has xxh128 {shown[0]} in the run, {shown[1]} now"


def _hashes(source: Mapping[str, Any], trained: bool) -> dict[str, str]:
    """xxh128 by file name; of a part that trains, its first weights do not matter any more."""
    files = {Path(file).name: xxh128 for file, xxh128 in {**source["files"], **source.get("settings", {})}.items()}
    weights = (".safetensors", ".bin", ".index.json")
    return {name: xxh128 for name, xxh128 in files.items() if not (trained and name.endswith(weights))}


def restore_training(engine: Any, point: ResumePoint, data_digest: str) -> None:
    """Puts the checkpoint into an engine whose model has its weights: fp32 weights, optimizer, schedule, counters.

    Raises ConfigError when the data are not those of the run, CheckpointError when it does not hold what trains.
    """
    before = point.state["data_digest"]
    if before != data_digest:
        raise ConfigError(
            f"{point.folder} was trained on other data: digest {before} in the run, {data_digest} now.\n"
            "  Give the data of the run, or start a new run from its weights with model.init_from."
        )
    restore(
        engine, held_places(engine), open_weights(point.folder), open_optimizer(point.folder),
        read_optimizer_steps(point.folder),
    )
    apply_state(engine, point.state)


def set_aside_newer(run_dir: Path, step: int, log: Callable[[str], None] = print) -> None:
    """Moves every checkpoint after ``step`` out of the way, and removes what was never finished."""
    for scratch in checkpoints_dir(run_dir).glob(f"{TRIAL_PREFIX}*"):
        shutil.rmtree(scratch)
    for folder in list_step_folders(run_dir):
        if not (folder / COMPLETE_MARKER).is_file():
            log(f"{folder} was not finished; it is removed")
            shutil.rmtree(folder)
        elif step_number(folder) > step:
            aside = _free_name(folder.with_name(f"set-aside-{folder.name}"))
            folder.rename(aside)
            log(f"{folder} is newer than the step that is resumed; it is now {aside}")


def _free_name(path: Path) -> Path:
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
