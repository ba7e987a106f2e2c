"""One set of weights as two checkpoints of several ranks: a run of ours, and what DeepSpeed's ZeRO-3 engine saves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llava_ds.checkpoint.fragments import STEP_FILE, shard_names
from llava_ds.checkpoint.initial import InitialWeights
from llava_ds.checkpoint.layout import commit, step_dir
from llava_ds.checkpoint.lazy import LazyTensor, in_memory
from llava_ds.checkpoint.sources import describe_sources
from llava_ds.checkpoint.writer import write_safetensors
from llava_ds.config import parse_config
from llava_ds.durable import sync_to_disk
from llava_ds.models.projector import build_projector
from llava_ds.models.vision_tower import TowerSpec, build_tower_from_spec
from llava_ds.quickstart.language import train_sentencepiece
from llava_ds.text.sentencepiece_tokenizer import build_sentencepiece_tokenizer

NUM_RANKS, VOCABULARY = 4, 32_000
TAG = "global_step4"
BLOCK = 1 << 22  # elements of the random block that all weights are made of
TOWER = TowerSpec(42, 14, 32, 3, 2, 64, 1e-5, "gelu", (0.5,) * 3, (0.5,) * 3, "bicubic")


def write_models(folder: Path, num_parameters: int) -> None:
    """A tiny tower, and a LLaMA of about so many parameters as config and tokenizer: its weights are the run's."""
    (folder / "tower").mkdir(parents=True)
    torch.manual_seed(0)
    save_file(build_tower_from_spec(TOWER, -2).visual.state_dict(), folder / "tower" / "model.safetensors")
    vision_cfg = {
        "layers": TOWER.layers, "width": TOWER.width, "head_width": TOWER.width // TOWER.heads,
        "patch_size": TOWER.patch_size, "image_size": TOWER.image_size, "mlp_ratio": TOWER.mlp_width / TOWER.width,
    }
    facts = {key: getattr(TOWER, key) for key in ("norm_eps", "act", "image_mean", "image_std", "interpolation")}
    (folder / "tower" / "tower_config.json").write_text(json.dumps({"vision_cfg": vision_cfg, **facts}))
    llm = folder / "llm"
    llm.mkdir()
    (llm / "tokenizer.model").write_bytes(train_sentencepiece(["Q: What is this?", "A: two green apples"] * 9))
    build_sentencepiece_tokenizer(llm / "tokenizer.model").save_pretrained(llm)
    llama_config(num_parameters).save_pretrained(llm)


def llama_config(num_parameters: int) -> LlamaConfig:
    """Wider and deeper with size, about as published models are: 512 wide at 0.05 billion, 2,560 at 2 billion."""
    width = 256 * max(2, round(2 * (num_parameters / 5e7) ** 0.436))
    inner = 64 * round(width * 8 / 3 / 64)
    per_layer = 4 * width**2 + 3 * width * inner + 2 * width
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_attention_heads=width // 128,
        num_hidden_layers=max(1, round((num_parameters - 2 * VOCABULARY * width) / per_layer)),
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def make_weights(folder: Path) -> dict[str, LazyTensor]:
    """What trains, by our names in the model's order: LLM and projector; values are made when they are read."""
    config = AutoConfig.from_pretrained(folder / "llm")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    projector = build_projector("mlp2x_gelu", TOWER.width, config.hidden_size, seed=0)
    shapes = {f"projector.{name}": tuple(value.shape) for name, value in projector.named_parameters()}
    shapes |= {f"llm.{name}": tuple(value.shape) for name, value in llm.named_parameters()}
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    return {name: _weight(block, number, shape) for number, (name, shape) in enumerate(shapes.items())}


def _weight(block: torch.Tensor, number: int, shape: Sequence[int]) -> LazyTensor:
    """The block again and again, each time by another factor: cheap, and a stretch out of place is another one."""

    def read(start: int, stop: int) -> torch.Tensor:
        out = torch.empty(stop - start)
        at = start
        while at < stop:
            repeat, offset = divmod(at, BLOCK)
            end = min(stop, at + BLOCK - offset)
            factor = 0.02 * (1 + number / 1000 + repeat / 1_000_000)
            torch.mul(block[offset : offset + end - at], factor, out=out[at - start : end - start])
            at = end
        return out

    return LazyTensor(torch.float32, tuple(shape), read, "the benchmark")


def open_tower(folder: Path) -> dict[str, LazyTensor]:
    """The frozen weights, by our names."""
    torch.manual_seed(0)
    visual = build_tower_from_spec(TOWER, -2).visual
    return {f"vision_tower.visual.{name}": in_memory(value) for name, value in visual.named_parameters()}


def share(tensor: LazyTensor, rank: int, num_ranks: int) -> tuple[int, LazyTensor]:
    """Where a rank's part of a parameter begins under ZeRO-3, and that part, which may be empty."""
    length = math.ceil(tensor.numel / num_ranks)
    begin = min(tensor.numel, rank * length)
    stop = min(tensor.numel, begin + length)
    return begin, LazyTensor(
        tensor.dtype, (stop - begin,), lambda first, last: tensor.read(begin + first, begin + last), tensor.origin
    )


def write_run(run: Path, models: Path, weights: Mapping[str, LazyTensor]) -> Path:
    """The run folder as training leaves it, without optimizer states."""
    step = step_dir(run, 4)
    step.mkdir(parents=True)
    records = {}
    for rank in range(NUM_RANKS):
        stretches = []
        for name, tensor in weights.items():
            begin, part = share(tensor, rank, NUM_RANKS)
            if part.numel:
                stretches.append((f"{name}@{begin}", part))
        file, _ = shard_names(rank, NUM_RANKS)
        records[file] = write_safetensors(step / file, stretches)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    (step / STEP_FILE).write_text(json.dumps({"parameters": shapes}))
    config = parse_config(
        {
            "name": "benchmark",
            "model": {"vision_tower": str(models / "tower"), "llm": str(models / "llm"), "llm_init": "random",
                      "projector": "mlp2x_gelu"},
            "data": {"path": str(models / "none.json"), "template": "short", "placement": "front"},
            "train": {"trainable": ["projector", "llm"], "global_batch_size": 4, "micro_batch_size": 1,
                      "learning_rate": 1e-3},
        },
        "benchmark",
    )
    record = {
        "config": config.model_dump(),
        "tower": TOWER.as_dict(),
        "initial_weights": InitialWeights().record,
        "sources": describe_sources(config.model, config.seed),
    }
    (step / "run.json").write_text(json.dumps(record))
    commit(step, records)
    return run


def write_zero3(
    folder: Path, trained: Mapping[str, LazyTensor], frozen: Mapping[str, LazyTensor], num_ranks: int = NUM_RANKS
) -> Path:
    """What DeepSpeed's conversion reads of ``engine.save_checkpoint``, under ZeRO-3 in fp32; a rank at a time.

    Without the optimizer's states: the conversion never reads them.
    """
    (folder / TAG).mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    for rank in range(num_ranks):
        names = [folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for kind in ("model", "optim")]
        states = (_model_states(trained, frozen, rank, num_ranks), _optimizer_states(trained, rank, num_ranks))
        for file, state in zip(names, states, strict=True):
            torch.save(state, file)
            sync_to_disk(file)
    return folder


def _model_states(
    trained: Mapping[str, LazyTensor], frozen: Mapping[str, LazyTensor], rank: int, num_ranks: int
) -> dict[str, Any]:
    return {
        "module": {name: torch.empty(0) for name in (*frozen, *trained)},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(tensor.shape) for name, tensor in trained.items()}],
        "frozen_param_shapes": {name: torch.Size(tensor.shape) for name, tensor in frozen.items()},
        "shared_params": {},
        "frozen_param_fragments": {name: _flat([tensor], rank, num_ranks) for name, tensor in frozen.items()},
        "dp_world_size": num_ranks,
        "mp_world_size": 1,
        "ds_version": version("deepspeed"),
    }


def _optimizer_states(trained: Mapping[str, LazyTensor], rank: int, num_ranks: int) -> dict[str, Any]:
    states = {
        "zero_stage": 3,
        "partition_count": num_ranks,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "fp32_flat_groups": [_flat(list(trained.values()), rank, num_ranks)],
    }
    return {"optimizer_state_dict": states, "ds_version": version("deepspeed")}


def _flat(tensors: Sequence[LazyTensor], rank: int, num_ranks: int) -> torch.Tensor:
    """A rank's parts one after the other, each filled up with zeros to the same length on every rank."""
    lengths = [math.ceil(tensor.numel / num_ranks) for tensor in tensors]
    flat = torch.zeros(sum(lengths))
    begin = 0
    for tensor, length in zip(tensors, lengths, strict=True):
        _, part = share(tensor, rank, num_ranks)
        at = begin
        for piece in part.pieces():
            flat[at : at + len(piece)] = piece
            at += len(piece)
        begin += length
    return flat
