#!/usr/bin/env python3
"""How long a save keeps training waiting, beside DeepSpeed's own: benchmarks/checkpoint_saving.py [--quick]."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import deepspeed
import torch
from machine import cpu_name
from torch import nn

from llava_ds.config import TrainConfig
from llava_ds.distributed import apply_launcher_environment
from llava_ds.engine.deepspeed_backend import init_distributed, initialize_engine
from llava_ds.engine.optim import build_optimizer, build_scheduler
from llava_ds.engine.saving import SavePolicy, Saver
from llava_ds.engine.training_state import Progress

WIDTH = 1024


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A small model and few repeats: under a minute.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to write [default: temporary].")
def main(quick: bool, json_file: Path | None, folder: Path | None) -> None:
    """Saves one model both ways in turn, under ZeRO-3 in one process, after a step of AdamW."""
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    figures = measure(*((20, 3) if quick else (100, 5)), folder)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def build_engine(num_layers: int) -> Any:
    """A stack of square layers after one step, so that the optimizer has its states."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))
    train = TrainConfig(trainable=["llm"], global_batch_size=1, micro_batch_size=1, learning_rate=1e-3)
    optimizer = build_optimizer(model, train)
    ds_config = {
        "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    engine = initialize_engine(model, optimizer, build_scheduler(optimizer, train, 10), ds_config)
    engine.backward(engine(torch.ones(1, WIDTH)).sum())
    engine.step()
    return engine


def measure(num_layers: int, num_repeats: int, folder: Path | None) -> dict[str, Any]:
    """The figures by name, each with its unit in the name or in the text."""
    ranks = apply_launcher_environment(os.environ)
    init_distributed(torch.device("cpu"))
    torch.manual_seed(0)
    engine = build_engine(num_layers)
    seconds: dict[str, list[float]] = {"blocked": [], "committed": [], "foreground": [], "deepspeed": []}
    num_bytes = 0
    with tempfile.TemporaryDirectory(dir=folder) as root:
        run_dir = Path(root) / "run"
        run_dir.mkdir()
        (run_dir / "run.json").write_text("{}")
        savers = {
            "blocked": Saver(engine, run_dir, ranks, SavePolicy(1)),
            "foreground": Saver(engine, run_dir, ranks, SavePolicy(1, in_background=False)),
        }
        for repeat in range(num_repeats + 1):  # the first one makes the buffers, and is not counted
            for name, saver in savers.items():
                progress = Progress(step=2 * repeat + 1 + (name == "foreground"))
                begin = time.perf_counter()
                saver.start(progress)
                if name == "blocked":
                    seconds[name].append(time.perf_counter() - begin)
                saver.finish()
                seconds["committed" if name == "blocked" else name].append(time.perf_counter() - begin)
                step = run_dir / "checkpoints" / f"step-{progress.step:08d}"
                num_bytes = sum(file.stat().st_size for file in step.iterdir())
            begin = time.perf_counter()
            engine.save_checkpoint(str(Path(root) / "theirs"), tag="step")
            for file in (Path(root) / "theirs" / "step").iterdir():  # theirs returns before the data are on disk
                handle = os.open(file, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            seconds["deepspeed"].append(time.perf_counter() - begin)
            shutil.rmtree(Path(root) / "theirs")
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["blocked"][1:], seconds["deepspeed"][1:], strict=True)]
    return {
        "measured": f"one save of {num_layers * WIDTH * WIDTH / 1e6:.0f} million parameters with AdamW's moments, "
        f"{num_bytes / 1e6:.0f} MB, ZeRO-3, one rank, fp32, on disk at the end (fsync), median of {num_repeats}",
        "on": f"{cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, DeepSpeed "
        f"{deepspeed.__version__}",
        "ours_training_waits_s": round(medians["blocked"], 4),
        "ours_until_committed_s": round(medians["committed"], 3),
        "ours_in_foreground_s": round(medians["foreground"], 3),
        "deepspeed_training_waits_s": round(medians["deepspeed"], 3),
        "deepspeed_waits_over_ours": round(medians["deepspeed"] / medians["blocked"], 1),
        "deepspeed_waits_over_ours_range": [round(min(ratios), 1), round(max(ratios), 1)],
        "deepspeed_over_ours_in_foreground": round(medians["deepspeed"] / medians["foreground"], 2),
    }


if __name__ == "__main__":
    main()
