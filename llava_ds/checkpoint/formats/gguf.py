"""GGUF for llama.cpp: ``text.gguf`` (the LLM) and ``mmproj.gguf`` (tower and projector). The one import site of gguf.

llama.cpp's CLIP tower, from May 2025 (its pull request 13321) to at least build 11549, puts the class token behind the
patches, but adds the positions and picks the patches as if it stood before them (its issue 25814). With
``class_token="last"`` the table of positions is in the order of that graph: every feature is right then, but the first
patch's is lost and the class token's stands at the end. ``"first"`` is for a llama.cpp with pull request 25844.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_ds.checkpoint.formats.gguf_vocab import describe_vocabulary
from llava_ds.checkpoint.keymap import LLM, PROJECTOR, TOWER, strip_prefix, tower_to_clip
from llava_ds.checkpoint.layout import FileRecord
from llava_ds.checkpoint.lazy import PIECE_ELEMENTS, LazyTensor, concatenated
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.checkpoint.writer import Progress, read_back
from llava_ds.errors import CheckpointError

TEXT_FILE, MMPROJ_FILE = "text.gguf", "mmproj.gguf"
FILE_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PAIR_SCALE = 64.0
"""Of the pair that a linear projector is written as. llama.cpp's gelu on the CPU looks values below 10 up in a table of
fp16; scaled, most of them are above. Where its GPU code computes in fp16, features up to 1023 still fit."""

_FILE_TYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
_TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
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


@dataclass(frozen=True)
class _Written:
    """A tensor of a file; ``pieces`` gives its flattened content in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]


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
    _gguf()
    folder.mkdir(parents=True, exist_ok=True)
    for path, (architecture, metadata, tensors) in plans.items():
        record = _write_file(path, architecture, metadata, tensors, progress)
        read_back(folder, {path.name: record})
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
        "attention.key_length": _head_width(config),
        "attention.value_length": _head_width(config),
        "rope.dimension_count": _head_width(config),
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
    spec, blocks = model.tower, _num_blocks(model)
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


def _head_width(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _num_blocks(model: StoredModel) -> int:
    return model.tower.layers + model.select_layer + 1


def plan_text(model: StoredModel, dtype: torch.dtype) -> dict[str, _Written]:
    """What ``text.gguf`` holds. Raises CheckpointError that lists the weights which have no place there."""
    config, out, homeless = model.text_config, {}, []
    head_width = _head_width(config)
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
            out[f"{new}.{kind}"] = _turned(value, head_width, dtype)
        else:
            out[f"{new}.{kind}"] = _plain(value, dtype)
    if homeless:
        raise CheckpointError(f"llama.cpp's llama has no place for {', '.join(homeless)}")
    return out


def plan_mmproj(model: StoredModel, dtype: torch.dtype, class_token: str) -> dict[str, _Written]:
    """What ``mmproj.gguf`` holds. Raises CheckpointError for a weight of the tower that has no place there."""
    out, blocks = {}, _num_blocks(model)
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


def _plan_projector(model: StoredModel, dtype: torch.dtype) -> dict[str, _Written]:
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


def _plain(value: LazyTensor, dtype: torch.dtype) -> _Written:
    """A tensor as it is; vectors are in fp32."""
    dtype = dtype if len(value.shape) > 1 else torch.float32
    return _Written(dtype, value.shape, value.cast(dtype).pieces)


def _turned(value: LazyTensor, head_width: int, dtype: torch.dtype) -> _Written:
    """Rows of q or k: rope turns the halves of a head in transformers, neighbours in llama.cpp."""
    plain = _plain(value, dtype)

    def pieces() -> Iterator[torch.Tensor]:
        for start in range(0, value.shape[0], head_width):
            head = value.rows(start, start + head_width).whole().to(plain.dtype)
            yield head.reshape(2, head_width // 2, -1).transpose(0, 1).flatten()

    return _Written(plain.dtype, value.shape, pieces)


def _of_blocks(shape: tuple[int, ...], make: Callable[[int, int], torch.Tensor]) -> _Written:
    """An fp32 tensor that is made some rows at a time."""
    step = max(1, PIECE_ELEMENTS // (shape[1] if len(shape) > 1 else 1))

    def pieces() -> Iterator[torch.Tensor]:
        for start in range(0, shape[0], step):
            yield make(start, min(shape[0], start + step)).flatten()

    return _Written(torch.float32, shape, pieces)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("GGUF is written with the package gguf; install llava_ds[gguf]") from error
    return gguf


def _write_file(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, _Written],
    progress: Progress | None,
) -> FileRecord:
    """Writes a file, a piece of a tensor at a time; on return it is on disk."""
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, architecture)
    for key, entry in metadata.items():
        _add(writer, key, entry)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        num_bytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        kind = gguf.GGMLQuantizationType[_TENSOR_TYPES[tensor.dtype]]
        # raw_dtype is the one that counts: numpy has no bf16.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digest = hashlib.sha256(path.read_bytes())
        with path.open("ab", buffering=0) as file:
            _append(file, digest, bytes(-file.tell() % writer.data_alignment))
            for name, tensor in tensors.items():
                for piece in tensor.pieces():
                    num_bytes = _append(file, digest, _as_bytes(name, piece.to(tensor.dtype)))
                    if progress:
                        progress(num_bytes)
                _append(file, digest, bytes(-file.tell() % writer.data_alignment))
            os.fsync(file.fileno())
            return FileRecord(file.tell(), digest.hexdigest())
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or error}. Make room, or choose a folder that can be written, and start again."
        ) from error
    finally:
        with suppress(OSError):  # of an error that is told already
            writer.close()


def _as_bytes(name: str, piece: torch.Tensor) -> memoryview:
    if piece.dtype == torch.float16 and piece.isinf().any():
        raise CheckpointError(f"{name} has values that fp16 does not hold; write bf16 or f32 (file_type)")
    return memoryview(piece.contiguous().view(torch.uint8).numpy().data).cast("B")


def _append(file: FileIO, digest: hashlib._Hash, block: memoryview | bytes) -> int:
    digest.update(block)
    done = 0
    while done < len(block):
        done += file.write(block[done:])
    return done


def _add(writer: Any, key: str, entry: Any) -> None:
    if isinstance(entry, bool):
        writer.add_bool(key, entry)
    elif isinstance(entry, int):
        writer.add_uint32(key, entry)
    elif isinstance(entry, float):
        writer.add_float32(key, entry)
    elif isinstance(entry, str):
        writer.add_string(key, entry)
    else:
        writer.add_array(key, entry)
