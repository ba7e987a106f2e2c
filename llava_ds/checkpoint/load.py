"""A whole model from a run or a merged folder, in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.keymap import from_llava_hf
from llava_ds.checkpoint.layout import reading, resolve_step
from llava_ds.checkpoint.trained import apply_trained, locate_trained, read_run
from llava_ds.config import ModelConfig
from llava_ds.constants import COMPLETE_MARKER
from llava_ds.errors import CheckpointError
from llava_ds.models.build import DTYPES, build_llm_from_config, build_model, load_tokenizer
from llava_ds.models.llava import Llava
from llava_ds.models.projector import build_projector
from llava_ds.models.vision_tower import TowerSpec, build_tower_from_spec

MERGED_FILE = "llava_ds.json"


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is needed to talk to it."""

    model: Llava
    tokenizer: Any
    template: str
    image_aspect_ratio: str


def find_checkpoint(path: Path) -> Path:
    """The checkpoint step or merged folder that ``path`` names; nothing is loaded.

    Raises CheckpointError when there is none, or it is not complete.
    """
    if not (path / MERGED_FILE).is_file():
        return resolve_step(path)
    if not (path / COMPLETE_MARKER).is_file():
        raise CheckpointError(f"{path} is not complete (no {COMPLETE_MARKER}); merge again")
    return path


def stored_dtype(path: Path) -> torch.dtype:
    """The precision that a run was trained in, or that a merged folder holds.

    Raises CheckpointError when there is no complete checkpoint.
    """
    step = find_checkpoint(path)
    if not (step / MERGED_FILE).is_file():
        return DTYPES[read_run(step)["config"]["train"]["precision"]]
    with reading(step / "config.json") as file:
        return getattr(torch, json.loads(file.read_text())["dtype"])


def load_model(path: Path, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model of a run folder, a checkpoint step or a merged folder.

    Raises CheckpointError when there is none, it is not complete, or something does not fit.
    """
    step = find_checkpoint(path)
    if (step / MERGED_FILE).is_file():
        return _load_merged(step, attn_implementation, dtype)
    config = read_run(step)["config"]
    model_config = ModelConfig.model_validate(config["model"])
    model = build_model(model_config, attn_implementation, dtype, config["seed"])
    apply_trained(model, locate_trained(step), _copy)
    tokenizer = load_tokenizer(model_config.llm)
    return LoadedModel(
        model.eval(), tokenizer, config["data"]["template"], config["data"]["image_aspect_ratio"]
    )


def export_llm(run: Path, out: Path) -> None:
    """Writes the LLM of a run as a transformers folder with its tokenizer."""
    loaded = load_model(run)
    loaded.model.llm.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)


def _load_merged(path: Path, attn_implementation: str, dtype: torch.dtype) -> LoadedModel:
    with reading(path / MERGED_FILE) as file:
        facts = json.loads(file.read_text())
    with reading(path / "config.json") as file:
        hf_config = json.loads(file.read_text())
    tower = build_tower_from_spec(TowerSpec.from_dict(facts["tower"]), facts["select_layer"]).to(dtype)
    llm = build_llm_from_config(hf_config["text_config"], attn_implementation, dtype)
    width = llm.config.get_text_config().hidden_size
    projector = build_projector(facts["projector"], tower.spec.width, width, seed=0).to(dtype)
    model = Llava(tower, projector, llm, zero_features=facts["zero_features"])
    with reading(path / "model.safetensors") as file:
        weights = from_llava_hf(file, facts["projector"], facts["projector_export"], tower.spec.width)
    result = model.load_state_dict(weights, strict=False)
    tied = {"llm.lm_head.weight"} if llm.config.get_text_config().tie_word_embeddings else set()
    missing = set(result.missing_keys) - tied
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{path} does not fit its own {MERGED_FILE}: missing {sorted(missing)}, "
            f"unexpected {result.unexpected_keys}; merge again"
        )
    return LoadedModel(model.eval(), load_tokenizer(str(path)), facts["template"], facts["image_aspect_ratio"])


def _copy(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
