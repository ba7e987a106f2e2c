"""GGUF for llama.cpp: ``text.gguf`` (the LLM) and ``mmproj.gguf`` (tower and projector).

llama.cpp's CLIP tower, from May 2025 (its pull request 13321) to at least build 11549, puts the class token behind the
patches, but adds the positions and picks the patches as if it stood before them (its issue 25814). With
``class_token="last"`` the table of positions is in the order of that graph: every feature is right then, but the first
patch's is lost and the class token's stands at the end. ``"first"`` is for a llama.cpp with pull request 25844.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.formats.gguf_file import check_file, import_gguf, write_file
from llava_ds.checkpoint.formats.gguf_tensors import head_width, num_tower_blocks, plan_mmproj, plan_text
from llava_ds.checkpoint.formats.gguf_vocab import describe_vocabulary
from llava_ds.checkpoint.keymap import LLM
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.checkpoint.writer import Progress, read_back
from llava_ds.errors import CheckpointError

TEXT_FILE, MMPROJ_FILE = "text.gguf", "mmproj.gguf"
FILE_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


def write_gguf(
    model: StoredModel, folder: Path, progress: Progress | None = None, file_type: str | None = None,
    class_token: str = "last",
) -> list[Path]:
    """Writes ``text.gguf`` and ``mmproj.gguf`` into ``folder`` and reads them back; returns their paths.

    Matrices are in ``file_type`` (one of ``FILE_TYPES``), by default in the model's precision; norms, biases, the
    patch embedding, positions and a linear projector are in fp32. In memory is no more than a piece of a tensor.
    ``class_token`` is ``last`` or ``first``, see above.

    Raises CheckpointError when llama.cpp cannot hold the model (all reasons at once, nothing is written then), when a
    value does not fit into fp16, a file cannot be written, or it does not hold what was written.
    """
    problems = find_problems(model)
    if file_type not in (None, *FILE_TYPES):
        problems.append(f"file_type={file_type!r} is not known; give one of {', '.join(FILE_TYPES)}")
    if class_token not in ("last", "first"):
        problems.append(f"class_token={class_token!r} is not known; give last or first")
    if problems:
        raise CheckpointError("this model cannot be written to GGUF:\n  " + "\n  ".join(problems))
    dtype = FILE_TYPES[file_type] if file_type else model.dtype
    plans = {
        folder / TEXT_FILE: ("llama", describe_text(model, dtype), plan_text(model, dtype)),
        folder / MMPROJ_FILE: (
            "clip", describe_mmproj(model, dtype, class_token), plan_mmproj(model, dtype, class_token)
        ),
    }
    import_gguf()
    folder.mkdir(parents=True, exist_ok=True)
    for path, (architecture, metadata, tensors) in plans.items():
        record = write_file(path, architecture, metadata, tensors, progress)
        read_back(folder, {path.name: record})
        check_file(path, tensors)
    return list(plans)


def find_problems(model: StoredModel) -> list[str]:
    """Why llama.cpp cannot hold a model; of its tokenizer says ``describe_vocabulary``."""
    config, spec, problems = model.text_config, model.tower, list[str]()
    table = model.weights.get(f"{LLM}model.embed_tokens.weight")
    if table and table.shape[0] != config["vocab_size"]:
        problems.append(f"the LLM's config has {config['vocab_size']} words, and its table {table.shape[0]} rows")
    if config.get("model_type") not in ("llama", "mistral"):
        problems.append(
            f"the LLM is {config.get('model_type')!r}; only llama and mistral are written. Convert to transformers, "
            "and the text model from there with llama.cpp's own convert_hf_to_gguf.py"
        )
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"the LLM's activation is {config['hidden_act']!r}; llama.cpp's llama has silu only")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear"):
        problems.append(f"the LLM's rope is of the type {rope['rope_type']!r}; default and linear are written")
    if spec.act not in ("gelu", "quick_gelu"):
        problems.append(f"the tower's activation is {spec.act!r}; llama.cpp's CLIP has gelu and quick_gelu")
    if spec.mlp_width == spec.width:
        problems.append(f"the tower's MLP is as wide as the tower, {spec.width}; llama.cpp would swap its matrices")
    if model.projector == "linear" and config["hidden_size"] < 2 * spec.width:
        problems.append(
            f"the projector is linear, and the LLM's width {config['hidden_size']} is less than twice the tower's "
            f"{spec.width}; llama.cpp knows two layers with gelu between only, and they hold a linear map from 2 x "
            f"{spec.width} = {2 * spec.width} on. Use transformers, or train with model.projector=mlp2x_gelu"
        )
    return problems


def describe_text(model: StoredModel, dtype: torch.dtype) -> dict[str, Any]:
    """Metadata of ``text.gguf``. Raises CheckpointError for a tokenizer that llama.cpp does not reproduce."""
    config = model.text_config
    heads, rope = config["num_attention_heads"], _rope(config)
    metadata = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "rope.dimension_count": head_width(config),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config["vocab_size"],
    }
    if config.get("sliding_window"):
        # llama.cpp's llama attends to everything: up to the window that is the same.
        metadata["context_length"] = min(metadata["context_length"], config["sliding_window"])
    if rope.get("rope_type") == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {
        "general.type": "model",
        "general.file_type": _FILE_TYPE_NUMBERS[dtype],
        **{f"llama.{name}": value for name, value in metadata.items()},
        **describe_vocabulary(model.tokenizer, model.template, config["vocab_size"]),
    }


def describe_mmproj(model: StoredModel, dtype: torch.dtype, class_token: str) -> dict[str, Any]:
    """Metadata of ``mmproj.gguf``. Of the tower it has the blocks up to the one whose output is used."""
    spec, blocks = model.tower, num_tower_blocks(model)
    return {
        "general.type": "mmproj",
        "general.file_type": _FILE_TYPE_NUMBERS[dtype],
        "llava_ds.class_token": class_token,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": spec.act == "gelu",
        "clip.vision.image_size": spec.image_size,
        "clip.vision.patch_size": spec.patch_size,
        "clip.vision.embedding_length": spec.width,
        "clip.vision.feed_forward_length": spec.mlp_width,
        "clip.vision.projection_dim": model.text_config["hidden_size"],
        "clip.vision.block_count": blocks,
        # Without it llama.cpp leaves out one block more than the file does.
        "clip.vision.feature_layer": [blocks],
        "clip.vision.attention.head_count": spec.heads,
        "clip.vision.attention.layer_norm_epsilon": float(spec.norm_eps),
        "clip.vision.image_mean": list(map(float, spec.image_mean)),
        "clip.vision.image_std": list(map(float, spec.image_std)),
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope's settings, from a config of transformers 5 or of before."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling, "rope_type": kind}
