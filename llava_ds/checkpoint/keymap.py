"""Names: ours <-> the llava-hf layout of transformers, vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from llava_ds.errors import CheckpointError
from llava_ds.models.llava import Llava

_TOWER = "vision_tower.vision_model."
_BLOCK_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWER_PARTS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


def choose_projector_export(kind: str, vision_width: int, llm_width: int) -> str:
    """How a projector is written as transformers' ``linear_1 -> act -> linear_2``.

    ``mlp``: as it is. ``relu_pair``: a linear map W as relu(x) - relu(-x), exact, which needs D >= 2 C.
    ``identity``: a linear map with act "linear" and an identity second layer, which only transformers reads.
    """
    if kind == "mlp2x_gelu":
        return "mlp"
    return "relu_pair" if llm_width >= 2 * vision_width else "identity"


def to_llava_hf(model: Llava, export: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a model under its llava-hf name."""
    yield from _tower_to_hf(model.vision_tower.visual)
    yield from _projector_to_hf(model.projector, export, model.llm.config.get_text_config().hidden_size)
    tied = model.llm.config.get_text_config().tie_word_embeddings
    for name, value in model.llm.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield f"language_model.{name}", value


def from_llava_hf(file: Path, kind: str, export: str, vision_width: int) -> dict[str, torch.Tensor]:
    """Our names from a llava-hf file; the inverse of ``to_llava_hf``."""
    hf = load_file(file)
    out: dict[str, torch.Tensor] = {}
    for name, value in hf.items():
        if name.startswith("language_model."):
            out[f"llm.{name.removeprefix('language_model.')}"] = value
    out |= {f"projector.{name}": value for name, value in _projector_from_hf(hf, kind, export, vision_width).items()}
    out |= {f"vision_tower.visual.{name}": value for name, value in _tower_from_hf(hf).items()}
    return out


def _tower_to_hf(visual: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in visual.state_dict().items():
        if name in _TOWER_PARTS:
            yield _TOWER + _TOWER_PARTS[name], value
        elif name.startswith("transformer.resblocks."):
            _, _, layer, part = name.split(".", 3)
            base = f"{_TOWER}encoder.layers.{layer}."
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    yield f"{base}self_attn.{letter}_proj.{kind}", third.contiguous()
            else:
                stem, kind = part.rsplit(".", 1)
                yield f"{base}{_BLOCK_PARTS[stem]}.{kind}", value
        elif name != "proj":
            raise CheckpointError(f"the tower's weight {name} has no place in a transformers CLIP vision model")


def _tower_from_hf(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {ours: hf[_TOWER + theirs] for ours, theirs in _TOWER_PARTS.items()}
    layer = 0
    while f"{_TOWER}encoder.layers.{layer}.layer_norm1.weight" in hf:
        base = f"{_TOWER}encoder.layers.{layer}."
        ours = f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [hf[f"{base}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            out[f"{ours}attn.in_proj_{kind}"] = torch.cat(parts)
            for stem, theirs in _BLOCK_PARTS.items():
                out[f"{ours}{stem}.{kind}"] = hf[f"{base}{theirs}.{kind}"]
        layer += 1
    return out


def _projector_to_hf(projector: nn.Module, export: str, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    state = projector.state_dict()
    if export == "mlp":
        for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
            for kind in ("weight", "bias"):
                yield f"multi_modal_projector.{theirs}.{kind}", state[f"{ours}.{kind}"]
        return
    weight, bias = state["weight"], state["bias"]  # [D, C], [D]
    vision_width = weight.shape[1]
    if export == "relu_pair":
        first = weight.new_zeros(width, vision_width)
        first[:vision_width] = torch.eye(vision_width, dtype=weight.dtype)
        first[vision_width : 2 * vision_width] = -torch.eye(vision_width, dtype=weight.dtype)
        second = weight.new_zeros(width, width)
        second[:, :vision_width], second[:, vision_width : 2 * vision_width] = weight, -weight
        tensors = (first, torch.zeros_like(bias), second, bias)
    else:
        tensors = (weight, bias, torch.eye(width, dtype=weight.dtype), torch.zeros_like(bias))
    names = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    for name, tensor in zip(names, tensors, strict=True):
        yield f"multi_modal_projector.{name}", tensor


def _projector_from_hf(
    hf: dict[str, torch.Tensor], kind: str, export: str, vision_width: int
) -> dict[str, torch.Tensor]:
    base = "multi_modal_projector."
    if kind == "mlp2x_gelu":
        return {
            f"{ours}.{part}": hf[f"{base}{theirs}.{part}"]
            for ours, theirs in (("0", "linear_1"), ("2", "linear_2"))
            for part in ("weight", "bias")
        }
    if export == "relu_pair":
        weight = hf[f"{base}linear_2.weight"][:, :vision_width].contiguous()
        return {"weight": weight, "bias": hf[f"{base}linear_2.bias"]}
    return {"weight": hf[f"{base}linear_1.weight"], "bias": hf[f"{base}linear_1.bias"]}
