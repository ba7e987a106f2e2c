"""What the tensors of ``text.gguf`` and ``mmproj.gguf`` are made of: llama.cpp's names, types and orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from llava_ds.checkpoint.formats.gguf_file import GgufTensor
from llava_ds.checkpoint.keymap import LLM, PROJECTOR, TOWER, strip_prefix, tower_to_clip
from llava_ds.checkpoint.lazy import PIECE_ELEMENTS, LazyTensor, concatenated
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.errors import CheckpointError

PAIR_SCALE = 64.0
"""Of the pair that a linear projector is written as. llama.cpp's gelu on the CPU looks values below 10 up in a table of
fp16; scaled, most of them are above. Where its GPU code computes in fp16, features up to 1023 still fit."""

_TEXT_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TEXT_BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}
_TOWER_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_TOWER_BLOCK_NAMES = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}


def head_width(config: Mapping[str, Any]) -> int:
    """Width of one attention head of an LLM."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def num_tower_blocks(model: StoredModel) -> int:
    """Blocks of the tower up to the one whose output is used."""
    return model.tower.layers + model.select_layer + 1


def plan_text(model: StoredModel, dtype: torch.dtype) -> dict[str, GgufTensor]:
    """What ``text.gguf`` holds. Raises CheckpointError that lists the weights which have no place there."""
    out, homeless = {}, []
    width = head_width(model.text_config)
    for name, value in strip_prefix(model.weights, LLM).items():
        stem, _, kind = name.rpartition(".")
        if name.endswith("rotary_emb.inv_freq"):  # a buffer in files of old
            continue
        new = _TEXT_NAMES.get(stem)
        if stem.startswith("model.layers."):
            _, _, block, part = stem.split(".", 3)
            new = f"blk.{block}.{_TEXT_BLOCK_NAMES[part]}" if part in _TEXT_BLOCK_NAMES else None
        if new is None:
            homeless.append(name)
        elif new.endswith(("attn_q", "attn_k")):
            out[f"{new}.{kind}"] = _turned(value, width, dtype)
        else:
            out[f"{new}.{kind}"] = _plain(value, dtype)
    if homeless:
        raise CheckpointError(f"llama.cpp's llama has no place for {', '.join(homeless)}")
    return out


def plan_mmproj(model: StoredModel, dtype: torch.dtype, class_token: str) -> dict[str, GgufTensor]:
    """What ``mmproj.gguf`` holds. Raises CheckpointError for a weight of the tower that has no place there."""
    out, blocks = {}, num_tower_blocks(model)
    for name, value in tower_to_clip(strip_prefix(model.weights, TOWER)).items():
        if name == "embeddings.position_embedding.weight" and class_token == "last":
            value = concatenated([value.rows(1, value.shape[0]), value.rows(0, 1)])
        if name in _TOWER_NAMES:
            # The patch embedding's type is that of a convolution, which in llama.cpp knows no bf16.
            out[_TOWER_NAMES[name]] = _plain(value, torch.float32)
        elif name.startswith("encoder.layers."):
            _, _, block, part = name.split(".", 3)
            stem, kind = part.rsplit(".", 1)
            if int(block) < blocks:
                out[f"v.blk.{block}.{_TOWER_BLOCK_NAMES[stem]}.{kind}"] = _plain(value, dtype)
    return out | _plan_projector(model, dtype)


def _plan_projector(model: StoredModel, dtype: torch.dtype) -> dict[str, GgufTensor]:
    own = strip_prefix(model.weights, PROJECTOR)
    if model.projector == "linear":
        width, vision_width = own["weight"].shape
        out = {
            "mm.0.weight": _of_blocks((width, vision_width), lambda start, stop: _signed(start, stop, vision_width)),
            "mm.0.bias": _of_blocks((width,), lambda start, stop: torch.zeros(stop - start)),
            "mm.2.weight": _of_blocks((width, width), lambda start, stop: _mirrored(own["weight"], start, stop)),
            "mm.2.bias": _plain(own["bias"], torch.float32),
        }
    else:
        out = {f"mm.{layer}.{kind}": _plain(own[f"{layer}.{kind}"], dtype)
               for layer in (0, 2) for kind in ("weight", "bias")}
    if model.zero_features:  # a blind run's features are zeros: nothing of them gets in
        shape = out["mm.0.weight"].shape
        out["mm.0.weight"] = _of_blocks(shape, lambda start, stop: torch.zeros(stop - start, *shape[1:]))
    return out


def _signed(start: int, stop: int, width: int) -> torch.Tensor:
    """Rows of [I; -I; 0], scaled."""
    rows, columns = torch.arange(start, stop)[:, None], torch.arange(width)[None]
    return PAIR_SCALE * ((rows == columns).float() - (rows == columns + width).float())


def _mirrored(weight: LazyTensor, start: int, stop: int) -> torch.Tensor:
    """Rows of [W, -W, 0], scaled back."""
    part = weight.rows(start, stop).whole().float() / PAIR_SCALE
    return torch.cat([part, -part, torch.zeros(stop - start, weight.shape[0] - 2 * weight.shape[1])], dim=1)


def _plain(value: LazyTensor, dtype: torch.dtype) -> GgufTensor:
    """A tensor as it is; vectors are in fp32."""
    dtype = dtype if len(value.shape) > 1 else torch.float32
    return GgufTensor(dtype, value.shape, value.cast(dtype).pieces)


def _turned(value: LazyTensor, width: int, dtype: torch.dtype) -> GgufTensor:
    """Rows of q or k: rope turns the halves of a head in transformers, neighbours in llama.cpp."""
    plain = _plain(value, dtype)

    def pieces() -> Iterator[torch.Tensor]:
        for start in range(0, value.shape[0], width):
            head = value.rows(start, start + width).whole().to(plain.dtype)
            yield head.reshape(2, width // 2, -1).transpose(0, 1).flatten()

    return GgufTensor(plain.dtype, value.shape, pieces)


def _of_blocks(shape: tuple[int, ...], make: Callable[[int, int], torch.Tensor]) -> GgufTensor:
    """An fp32 tensor that is made some rows at a time."""
    step = max(1, PIECE_ELEMENTS // (shape[1] if len(shape) > 1 else 1))

    def pieces() -> Iterator[torch.Tensor]:
        for start in range(0, shape[0], step):
            yield make(start, min(shape[0], start + step)).flatten()

    return GgufTensor(torch.float32, shape, pieces)
