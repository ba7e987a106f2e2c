"""A tiny world for tests: a CLIP-shaped tower, a small LLaMA with its own tokenizer, pictures and conversations."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_ds.checkpoint.fragments import STEP_FILE, Fragment, shard_names, shard_tensors
from llava_ds.checkpoint.initial import InitialWeights, open_initial
from llava_ds.checkpoint.layout import commit, step_dir
from llava_ds.checkpoint.sources import describe_sources
from llava_ds.checkpoint.writer import write_safetensors
from llava_ds.config import load_recipe
from llava_ds.models.build import build_model
from llava_ds.models.vision_tower import TowerSpec, build_tower_from_spec
from llava_ds.quickstart.language import train_sentencepiece
from llava_ds.text.sentencepiece_tokenizer import build_sentencepiece_tokenizer

IMAGE_SIZE, PATCH, VISION_WIDTH, LLM_WIDTH = 42, 14, 32, 64  # 9 patches; D >= 2 C
SENTENCES = ["Q: What is this?", "A: a red fox", "A: two green apples", "Q: Where is the fox?", "A: on the left"]


def write_tower(folder: Path, act: str = "gelu") -> Path:
    """A random tower of 3 blocks in the folder layout that ``build_tower`` reads."""
    spec = TowerSpec(IMAGE_SIZE, PATCH, VISION_WIDTH, 3, 2, 64, 1e-5, act, (0.5,) * 3, (0.5,) * 3, "bicubic")
    torch.manual_seed(11)
    tower = build_tower_from_spec(spec, -2)
    folder.mkdir(parents=True)
    save_file(tower.visual.state_dict(), folder / "model.safetensors")
    config = {
        "vision_cfg": {"layers": 3, "width": VISION_WIDTH, "head_width": 16, "patch_size": PATCH,
                       "image_size": IMAGE_SIZE, "mlp_ratio": 2.0},
        "norm_eps": 1e-5, "act": act, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "interpolation": "bicubic",
    }
    (folder / "tower_config.json").write_text(json.dumps(config))
    return folder


def write_open_clip(folder: Path) -> tuple[str, open_clip.CLIP]:
    """A small model among open_clip's, by its name, and a file of its weights in ``folder``: ``clip.pt``."""
    name = "ViT-tiny-of-tests"
    config = {
        "embed_dim": 16, "vision_cfg": {"image_size": 28, "layers": 2, "width": 64, "patch_size": 14},
        "text_cfg": {"context_length": 9, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(2)
    clip = open_clip.create_model(name)
    torch.save(clip.state_dict(), folder / "clip.pt")
    return name, clip


def write_llm(folder: Path, tie_word_embeddings: bool = False) -> Path:
    """Tokenizer and config of a LLaMA with 2 layers and D = 64."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(SENTENCES * 3))
    tokenizer = build_sentencepiece_tokenizer(folder / "tokenizer.model")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=LLM_WIDTH, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tie_word_embeddings, architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(12)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(folder: Path, num_samples: int = 11) -> Path:
    """LLaVA JSON with one-turn, two-turn and text-only records of different lengths, and their pictures."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    records = []
    for number in range(num_samples):
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a red fox"}]
        if number % 3 == 1:
            turns += [{"from": "human", "value": "Where is the fox?"}, {"from": "gpt", "value": "on the left " * 3}]
        record = {"id": f"s{number}", "image": f"{number}.png", "conversations": turns}
        if number % 4 == 3:
            del record["image"]
            turns[0]["value"] = "What is this?"
        else:
            size = (50 + number, 44)
            pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def write_recipe(root: Path, **changes) -> Path:
    """A recipe file over the tiny world in ``root``; ``changes`` are ``group__key=value``."""
    raw = {
        "name": "tiny",
        "model": {"vision_tower": str(root / "tower"), "llm": str(root / "llm"), "projector": "linear"},
        "data": {"path": str(root / "data" / "train.json"), "template": "short", "placement": "random",
                 "num_workers": 0},
        "train": {"trainable": ["projector", "llm"], "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 4,
                  "epochs": 10, "learning_rate": 1e-3},
    }
    for key, value in changes.items():
        group, name = key.split("__")
        raw.setdefault(group, {})[name] = value
    file = root / f"tiny-{len(list(root.glob('tiny-*.yaml')))}.yaml"
    file.write_text(json.dumps(raw))  # JSON is YAML
    return file


def write_world(root: Path) -> Path:
    """Tower, LLM and data in ``root``."""
    write_tower(root / "tower")
    write_llm(root / "llm")
    write_data(root / "data")
    return root


def write_run(root: Path, name: str = "run", trained: tuple[str, ...] = ("projector", "llm"), **changes) -> Path:
    """A run folder as training on 3 ranks leaves it, with weights of its own; ``changes`` are ``write_recipe``'s.

    ``trained`` are the parts that its checkpoint holds; for the others it names their sources.
    """
    config = load_recipe(str(write_recipe(root, **changes)))
    initial = open_initial(Path(config.model.init_from)).record if config.model.init_from else InitialWeights().record
    model = build_model(config.model, "sdpa", torch.float32, seed=21)
    record = {
        "config": config.model_dump(),
        "tower": model.vision_tower.spec.as_dict(),
        "initial_weights": initial,
        "sources": describe_sources(config.model, seed=21),
    }
    weights = {n: p.detach() for n, p in model.named_parameters() if n.startswith(tuple(f"{t}." for t in trained))}
    write_step(root / name, weights, record)
    return root / name


def write_step(
    run: Path, weights: dict[str, torch.Tensor], record: dict, number: int = 4, optimizer: bool = True
) -> Path:
    """A committed step with weights and an optimizer state, spread unevenly over the shards of 3 ranks."""
    step = step_dir(run, number)
    step.mkdir(parents=True)
    shards: list[list[Fragment]] = [[], [], []]
    for parameter, value in weights.items():
        flat = value.flatten().float()
        cuts = [0, len(flat) // 5, len(flat) // 5 + len(flat) // 7, len(flat)]
        for rank, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                piece = flat[start:stop]
                states = {"exp_avg": torch.zeros_like(piece)} if optimizer else {}
                shards[rank].append(Fragment(parameter, start, piece, states))
    for rank, fragments in enumerate(shards):
        for file, tensors in zip(shard_names(rank, 3), shard_tensors(fragments), strict=True):
            write_safetensors(step / file, tensors)
    shapes = {parameter: list(value.shape) for parameter, value in weights.items()}
    (step / STEP_FILE).write_text(json.dumps({"parameters": shapes}))
    (step / "run.json").write_text(json.dumps(record))
    commit(step)
    return step
