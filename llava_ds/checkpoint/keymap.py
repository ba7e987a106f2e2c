"""Names and shapes of weights: ours <-> those of transformers (llava-hf) and of the original LLaVA code.

All mappings are between dictionaries of lazy tensors: nothing is read here but the projector of the paper (a matrix).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llava_ds.checkpoint.lazy import LazyTensor, concatenated, in_memory
from llava_ds.errors import CheckpointError, ConfigError

TOWER = "vision_tower.visual."
PROJECTOR = "projector."
LLM = "llm."
HF_TOWER = "vision_tower.vision_model."
HF_PROJECTOR = "multi_modal_projector."
HF_LLM = "language_model."

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
_BUFFERS = ("embeddings.position_ids",)  # older files hold it; it is no weight
PROJECTOR_ACTS = {"mlp": "gelu", "relu_pair": "relu", "gelu_pair": "gelu", "identity": "linear"}
"""transformers' ``projector_hidden_act`` by the way a projector is written."""

_HF_PROJECTOR_NAMES = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
_PAIRS = ("relu_pair", "gelu_pair")

Weights = dict[str, LazyTensor]


def strip_prefix(weights: Mapping[str, LazyTensor], prefix: str) -> Weights:
    """The weights below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def add_prefix(weights: Mapping[str, LazyTensor], prefix: str) -> Weights:
    """The weights with a prefix."""
    return {prefix + name: value for name, value in weights.items()}


def tower_to_clip(visual: Mapping[str, LazyTensor]) -> Weights:
    """open_clip's vision transformer -> transformers' CLIP vision model (names below ``vision_model.``).

    Raises CheckpointError for a weight that has no place there.
    """
    out: Weights = {}
    for name, value in visual.items():
        if name in _TOWER_PARTS:
            out[_TOWER_PARTS[name]] = value
        elif name.startswith("transformer.resblocks."):
            _, _, layer, part = name.split(".", 3)
            base = f"encoder.layers.{layer}."
            if part.startswith("attn.in_proj_"):
                kind, third = part.removeprefix("attn.in_proj_"), value.shape[0] // 3
                for number, letter in enumerate("qkv"):
                    rows = value.rows(number * third, (number + 1) * third)
                    out[f"{base}self_attn.{letter}_proj.{kind}"] = rows
            elif part.rpartition(".")[0] in _BLOCK_PARTS:
                stem, kind = part.rsplit(".", 1)
                out[f"{base}{_BLOCK_PARTS[stem]}.{kind}"] = value
            else:
                raise _no_place(name)
        elif name != "proj":  # of the joint embedding with text, which patch features never reach
            raise _no_place(name)
    return out


def _no_place(name: str) -> CheckpointError:
    return CheckpointError(
        f"the tower's weight {name} has no place in a transformers CLIP vision model; only open_clip's plain ViT-* "
        "towers can be converted"
    )


def tower_from_clip(clip: Mapping[str, LazyTensor]) -> Weights:
    """The inverse of ``tower_to_clip``. Raises CheckpointError that names what is missing, or has no place here."""
    left = {name: value for name, value in clip.items() if name not in _BUFFERS}

    def take(name: str) -> LazyTensor:
        if name not in left:
            raise CheckpointError(f"the CLIP vision model lacks {name}; give a whole one")
        return left.pop(name)

    out = {ours: take(theirs) for ours, theirs in _TOWER_PARTS.items()}
    layer = 0
    while f"encoder.layers.{layer}.layer_norm1.weight" in left:
        base, ours = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [take(f"{base}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            out[f"{ours}attn.in_proj_{kind}"] = concatenated(parts)
            for stem, theirs in _BLOCK_PARTS.items():
                out[f"{ours}{stem}.{kind}"] = take(f"{base}{theirs}.{kind}")
        layer += 1
    if left:
        raise CheckpointError(f"the CLIP vision model has weights without a place here: {list_some(left)}")
    return out


def list_some(names: Iterable[str], most: int = 8) -> str:
    """The first names of many, and how many more there are."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def choose_projector_export(kind: str, vision_width: int, llm_width: int, act: str = "auto") -> str:
    """How a projector is written as transformers' ``linear_1 -> act -> linear_2``.

    ``mlp``: as it is. ``relu_pair``: a linear map as W relu(x) - W relu(-x), exact, which needs D >= 2 C.
    ``gelu_pair``: the same with gelu, for readers that know no other activation; exact but for rounding.
    ``identity``: a linear map with act "linear" and an identity second layer, which only transformers reads.

    ``act`` chooses among them for a linear map: relu, gelu or linear; ``auto`` is relu where it fits, else linear.
    Raises ConfigError where it does not fit.
    """
    if kind == "mlp2x_gelu":
        if act not in ("auto", "gelu"):
            raise ConfigError(f"the activation {act} is asked for, but the projector is mlp2x_gelu, whose own is gelu")
        return "mlp"
    fits = llm_width >= 2 * vision_width
    if act == "auto":
        return "relu_pair" if fits else "identity"
    if act != "linear" and not fits:
        raise ConfigError(
            f"a linear projector is written with {act} as a pair, which needs an LLM at least twice as wide as the "
            f"tower, and they are {llm_width} and {vision_width} wide; only the activation linear fits, which only "
            "transformers reads"
        )
    return {"relu": "relu_pair", "gelu": "gelu_pair", "linear": "identity"}[act]


def projector_to_hf(projector: Mapping[str, LazyTensor], export: str) -> Weights:
    """Our projector (names below ``projector.``) as transformers' two layers (below ``multi_modal_projector.``)."""
    if export == "mlp":
        return {f"linear_{layer}.{kind}": projector[f"{ours}.{kind}"]
                for layer, ours in ((1, 0), (2, 2)) for kind in ("weight", "bias")}
    weight, bias = projector["weight"].whole(), projector["bias"].whole()  # [D, C], [D]
    width, vision_width = weight.shape
    if export in _PAIRS:
        first = weight.new_zeros(width, vision_width)
        first[:vision_width] = torch.eye(vision_width, dtype=weight.dtype)
        first[vision_width : 2 * vision_width] = -torch.eye(vision_width, dtype=weight.dtype)
        second = weight.new_zeros(width, width)
        second[:, :vision_width], second[:, vision_width : 2 * vision_width] = weight, -weight
        tensors = (first, torch.zeros_like(bias), second, bias)
    else:
        tensors = (weight, bias, torch.eye(width, dtype=weight.dtype), torch.zeros_like(bias))
    origin = projector["weight"].origin
    return {name: in_memory(tensor, origin) for name, tensor in zip(_HF_PROJECTOR_NAMES, tensors, strict=True)}


def projector_from_hf(hf: Mapping[str, LazyTensor], export: str) -> Weights:
    """The inverse of ``projector_to_hf``. Raises CheckpointError that names a missing weight."""
    _check_whole_projector(hf)
    if export == "mlp":
        return {f"{ours}.{kind}": hf[f"linear_{layer}.{kind}"]
                for layer, ours in ((1, 0), (2, 2)) for kind in ("weight", "bias")}
    if export in _PAIRS:
        vision_width = hf["linear_1.weight"].shape[1]
        weight = hf["linear_2.weight"].whole()[:, :vision_width].contiguous()
        return {"weight": in_memory(weight, hf["linear_2.weight"].origin), "bias": hf["linear_2.bias"]}
    return {"weight": hf["linear_1.weight"], "bias": hf["linear_1.bias"]}


def _check_whole_projector(hf: Mapping[str, LazyTensor]) -> None:
    missing = [name for name in _HF_PROJECTOR_NAMES if name not in hf]
    if missing:
        raise CheckpointError(f"the projector lacks {', '.join(missing)}; give a whole checkpoint")
    unknown = sorted(hf.keys() - set(_HF_PROJECTOR_NAMES))
    if unknown:
        raise CheckpointError(f"the projector has weights without a place here: {list_some(unknown)}")


def recognise_projector(hf: Mapping[str, LazyTensor], act: str) -> str:
    """Which ``choose_projector_export`` wrote a transformers projector; a plain two-layer one is ``mlp``.

    Raises CheckpointError for an activation that is none of ours, and for a weight that is missing or unknown.
    """
    _check_whole_projector(hf)
    first = hf["linear_1.weight"].whole().float()
    width, vision_width = first.shape
    if act == "linear":
        is_identity = torch.equal(hf["linear_2.weight"].whole().float(), torch.eye(width))
        if is_identity and not hf["linear_2.bias"].whole().any():
            return "identity"
    # With act relu or gelu: I, -I, 0 in the first layer, no bias; W, -W, 0 in the second.
    if width >= 2 * vision_width and act in ("relu", "gelu"):
        pair = torch.zeros_like(first)
        pair[:vision_width], pair[vision_width : 2 * vision_width] = torch.eye(vision_width), -torch.eye(vision_width)
        second = hf["linear_2.weight"].whole().float()
        mirrored = torch.equal(second[:, :vision_width], -second[:, vision_width : 2 * vision_width])
        rest_is_zero = not second[:, 2 * vision_width :].any() and not hf["linear_1.bias"].whole().any()
        if torch.equal(first, pair) and mirrored and rest_is_zero:
            return f"{act}_pair"
    if act == "gelu":
        return "mlp"
    raise CheckpointError(
        f"a two-layer projector with the activation {act!r} is not known here; only gelu is, and what stands for a "
        "linear one (see docs/checkpoints.md)"
    )


def llava_hf_names(names: Mapping[str, LazyTensor]) -> Weights:
    """The weights of a transformers LLaVA under llava-hf's names, in whichever of its four layouts they are stored.

    llava-hf's own (``language_model.model.*``, ``vision_tower.vision_model.*``), what transformers 5 writes (without
    ``vision_model``), and the names in memory since 4.52 (``model.language_model.*``, ``lm_head.weight``), with
    ``vision_model`` or without.
    """
    out: Weights = {}
    in_memory_names = any(name.startswith("model.language_model.") for name in names)
    for name, value in names.items():
        new = name
        if in_memory_names:
            if name.startswith("model.language_model."):
                new = "language_model.model." + name.removeprefix("model.language_model.")
            elif name.startswith("lm_head."):
                new = f"language_model.{name}"
            else:
                new = name.removeprefix("model.")
        if new.startswith("vision_tower.") and not new.startswith("vision_tower.vision_model."):
            new = "vision_tower.vision_model." + new.removeprefix("vision_tower.")
        out[new] = value
    return out
