"""Checkpoints of a run: the trained parameters, gathered one at a time, committed by the file written last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.layout import commit, list_steps, step_dir, write_safetensors_stream
from llava_ds.engine.deepspeed_backend import full_shape, iterate_trained, trained_parameters
from llava_ds.engine.loop import Progress


def save_step(engine: Any, run_dir: Path, progress: Progress, keep_last: int, is_main: bool) -> None:
    """Writes ``run_dir/checkpoints/step-N``; collective. Earlier steps beyond ``keep_last`` are removed after."""
    target = step_dir(run_dir, progress.step)
    entries = iterate_trained(engine.module, is_main)
    if not is_main:
        for _ in entries:
            pass
        return
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    header = [(name, p.dtype, full_shape(p)) for name, p in trained_parameters(engine.module)]
    write_safetensors_stream(target / "trainable.safetensors", _present(entries), header)
    (target / "step.json").write_text(json.dumps(asdict(progress), indent=1))
    shutil.copyfile(run_dir / "run.json", target / "run.json")
    commit(target)
    for old in list_steps(run_dir)[:-keep_last]:
        shutil.rmtree(old)


def _present(entries: Iterator[tuple[str, torch.Tensor | None]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in entries:
        if value is not None:
            yield name, value
