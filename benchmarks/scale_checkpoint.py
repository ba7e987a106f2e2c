"""Part of thousand_ranks.py: a step that every rank writes a part of, read back as resume and merge do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from scale_child import Figures, check, timed

from llava_ds.checkpoint.fragments import (
    STEP_FILE,
    STEPS_KEY,
    Fragment,
    open_optimizer,
    open_weights,
    read_optimizer_steps,
    shard_names,
    shard_tensors,
)
from llava_ds.checkpoint.layout import MANIFEST_FILE, FileRecord, commit, find_damage, read_manifest
from llava_ds.checkpoint.tensor_files import read_safetensors_header
from llava_ds.checkpoint.writer import write_safetensors

NUM_WRITERS = 32
"""Ranks that write at a time, as other ranks do on other machines: a sync waits for the disk, not for the CPU."""
_WIDTH, _INNER, _WORDS = 96, 256, 1024
Model = Mapping[str, torch.Tensor]


def build_model(num_layers: int) -> dict[str, torch.Tensor]:
    """The parameters of a LLaMA by their names; 32 layers have as many as LLaVA-7B, each of them small.

    The norms have fewer elements than there are ranks, so that some ranks keep nothing of them.
    """
    shapes: dict[str, tuple[int, ...]] = {"llm.model.embed_tokens.weight": (_WORDS, _WIDTH)}
    for layer in range(num_layers):
        prefix = f"llm.model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (_WIDTH, _WIDTH) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (_INNER, _WIDTH) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (_WIDTH, _INNER)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (_WIDTH,) for name in ("input", "post_attention")}
    shapes |= {"llm.model.norm.weight": (_WIDTH,), "llm.lm_head.weight": (_WORDS, _WIDTH)}
    shapes |= {"projector.weight": (_WIDTH, 64), "projector.bias": (_WIDTH,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fragments_of(model: Model, rank: int, num_ranks: int) -> Iterator[Fragment]:
    """What a rank keeps under ZeRO-3: every parameter is cut into equal stretches, the last ones shorter or empty."""
    for name, parameter in model.items():
        flat = parameter.flatten()
        length = -(-flat.numel() // num_ranks)
        weight = flat[rank * length : (rank + 1) * length]
        if len(weight):
            yield Fragment(name, rank * length, weight, {"exp_avg": weight * 0.5, "exp_avg_sq": weight * weight})


def measure_checkpoint(model: Model, num_ranks: int, step: Path) -> Figures:
    """Writes, commits, verifies, reads and damages one step."""
    figures: Figures = {}
    step.mkdir(parents=True)
    with (
        timed(figures, "checkpoint_write_all_s"),
        timed(figures, "checkpoint_write_rank_cpu_ms", num_ranks),
        ThreadPoolExecutor(NUM_WRITERS) as pool,
    ):
        list(pool.map(lambda rank: _write_rank(model, rank, num_ranks, step), range(num_ranks)))
    with timed(figures, "checkpoint_commit_s"):
        _commit(model, num_ranks, step)
    figures |= _sizes(step, num_ranks)
    figures |= _verify(num_ranks, step)
    figures |= _read_back(model, step)
    _find_damaged_byte(num_ranks, step)
    return figures


def _write_rank(model: Model, rank: int, num_ranks: int, step: Path) -> None:
    """What the thread of a rank does in a save."""
    fragments = list(fragments_of(model, rank, num_ranks))
    tensors = zip(shard_names(rank, num_ranks), shard_tensors(fragments), strict=True)
    (weights_name, weights), (states_name, states) = tensors
    metadata = {STEPS_KEY: json.dumps({fragment.parameter: 1 for fragment in fragments})}
    records = {
        weights_name: asdict(write_safetensors(step / weights_name, weights)),
        states_name: asdict(write_safetensors(step / states_name, states, metadata=metadata)),
    }
    _note(step, rank).write_text(json.dumps(records))


def _note(step: Path, rank: int) -> Path:
    return step / f"written-{rank:05d}.json"


def _commit(model: Model, num_ranks: int, step: Path) -> None:
    """What rank 0 does while training waits: collects what each rank wrote, and marks the step complete."""
    records: dict[str, FileRecord] = {}
    for rank in range(num_ranks):
        raw = json.loads(_note(step, rank).read_text())
        records |= {name: FileRecord(**record) for name, record in raw.items()}
        _note(step, rank).unlink()
    shapes = {name: list(parameter.shape) for name, parameter in model.items()}
    (step / STEP_FILE).write_text(json.dumps({"world_size": num_ranks, "parameters": shapes}) + "\n")
    (step / "run.json").write_text("{}")
    commit(step, records)


def _sizes(step: Path, num_ranks: int) -> Figures:
    files = [step / name for name in read_manifest(step) if name.endswith(".safetensors")]
    check(len(files) == 2 * num_ranks, f"{len(files)} shards, not {2 * num_ranks}")
    return {
        "checkpoint_manifest_kb": (step / MANIFEST_FILE).stat().st_size / 1e3,
        "checkpoint_headers_mb": sum(read_safetensors_header(file)[1] for file in files) / 1e6,
        "checkpoint_total_mb": sum(file.stat().st_size for file in files) / 1e6,
    }


def _verify(num_ranks: int, step: Path) -> Figures:
    """Every rank looks at its share of the files, as on resume."""
    names = sorted(read_manifest(step))
    figures: Figures = {}
    with timed(figures, "checkpoint_verify_rank_cpu_ms", num_ranks):
        problems = [line for rank in range(num_ranks) for line in find_damage(step, names[rank::num_ranks])]
    check(not problems, f"a whole step of {num_ranks} ranks is called damaged: {problems[:2]}")
    return figures


def _read_back(model: Model, step: Path) -> Figures:
    """What every rank opens on resume, and all weights whole, as a merge reads them."""
    figures: Figures = {}
    with timed(figures, "checkpoint_open_rank_cpu_s"):
        weights, states, steps = open_weights(step), open_optimizer(step), read_optimizer_steps(step)
    check(list(weights) == list(model), "the weights are not those that were written, in their order")
    check(set(steps) == set(model) and len(states) == 2 * len(model), "the optimizer's states are not those written")
    with timed(figures, "checkpoint_read_weights_cpu_s"):
        different = [name for name, tensor in weights.items() if not torch.equal(tensor.whole(), model[name])]
    check(not different, f"read back with other bits: {different[:3]}")
    name = next(reversed(model))
    wrong = not torch.equal(states[f"exp_avg_sq/{name}"].whole(), model[name] * model[name])
    check(not wrong, f"the second moment of {name} is read back with other bits")
    return figures


def _find_damaged_byte(num_ranks: int, step: Path) -> None:
    """One byte of one file is changed: the rank that looks at that file names it, and the others nothing."""
    damaged = step / shard_names(num_ranks // 2, num_ranks)[1]
    with damaged.open("r+b") as file:
        file.seek(-2, 2)
        byte = file.read(1)[0]
        file.seek(-2, 2)
        file.write(bytes([byte ^ 1]))
    problems = find_damage(step)
    named = len(problems) == 1 and problems[0].startswith(f"{damaged}: xxh128")
    check(named, f"a changed byte in {damaged.name} was reported as {problems[:3]}")
