"""What a run leaves beside its checkpoints: run.json before step 1, the loss curve and the next command at the end."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from llava_ds.config import RunConfig
from llava_ds.data.build import TrainingData
from llava_ds.distributed import Ranks
from llava_ds.engine.loop import Progress
from llava_ds.metrics.plots import plot_loss
from llava_ds.metrics.trackers import read_metrics
from llava_ds.models.build import Backend
from llava_ds.models.llava import Llava

_PACKAGES = ("llava_ds", "torch", "deepspeed", "transformers", "open_clip_torch", "numpy")


def start_run(
    run_dir: Path,
    config: RunConfig,
    ds_config: dict[str, Any],
    model: Llava,
    attention: Backend,
    packing: Backend,
    data: TrainingData,
    ranks: Ranks,
) -> None:
    """Writes run.json (rank 0) and says what is about to run. An earlier run in the folder is set aside, not lost."""
    if not ranks.is_main:
        return
    if (run_dir / "run.json").exists():
        number = next(n for n in count(1) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
        aside = run_dir.with_name(f"{run_dir.name}.{number}")
        run_dir.rename(aside)
        print(f"{run_dir} held an earlier run; it is now {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {
        "config": config.model_dump(),
        "ds_config": ds_config,
        "tower": model.vision_tower.spec.as_dict(),
        "attention": vars(attention),
        "packing": vars(packing),
        "world_size": ranks.world_size,
        "num_samples": len(data.lengths.num_tokens),
        "num_steps": data.num_steps,
        "skipped": dict(data.skipped),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
    }
    (run_dir / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{config.name}: {len(data.lengths.num_tokens)} samples, {data.num_steps} steps, {ranks.world_size} rank(s)")
    print(f"attention: {attention.name} ({attention.reason}); batches: {packing.name} ({packing.reason})")
    if data.skipped:
        print(f"skipped {sum(data.skipped.values())} samples: {dict(data.skipped)}")


def finish_run(run_dir: Path, config: RunConfig, progress: Progress, seconds: float, ranks: Ranks) -> None:
    """Draws the loss curve and prints where everything is (rank 0)."""
    if not ranks.is_main:
        return
    plot_loss({config.name: read_metrics(run_dir / "metrics.jsonl")}, run_dir / "loss.png")
    print(f"{config.name}: {progress.step} steps in {seconds:.0f} s, last loss {progress.loss:.4f}, in {run_dir}")
    if config.next_command:
        print(f"Next: {config.next_command.replace('{run_dir}', str(run_dir))}")
