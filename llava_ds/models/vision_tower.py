"""The frozen CLIP vision transformer, through open_clip: the one import site of open_clip."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from safetensors.torch import load_file
from torch import nn

from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.ops.normalise import normalise_levels

TOWER_CONFIG_FILE = "tower_config.json"


@dataclass(frozen=True)
class TowerSpec:
    """What a tower is, apart from its weights; enough to build it again and to export it."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    norm_eps: float
    act: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    interpolation: str

    @property
    def num_patches(self) -> int:
        """Patches of one image, P."""
        return (self.image_size // self.patch_size) ** 2

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written to checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TowerSpec:
        """The inverse of ``as_dict``."""
        return cls(**{**raw, "image_mean": tuple(raw["image_mean"]), "image_std": tuple(raw["image_std"])})


class VisionTower(nn.Module):
    """Patch features of the block that ``select_layer`` names; the blocks above it never run.

    Always frozen and in evaluation mode. ``select_layer=-2`` is the output of the block before the last,
    without the final LayerNorm and without the class token, as LLaVA uses it.
    """

    def __init__(self, visual: Any, spec: TowerSpec, select_layer: int) -> None:
        super().__init__()
        if not -spec.layers <= select_layer <= -1:
            raise ConfigError(
                f"model.select_layer={select_layer} but the tower has {spec.layers} blocks; "
                f"use -1 (last) to -{spec.layers}"
            )
        self.visual: Any = visual.eval().requires_grad_(False)
        self.spec = spec
        self.block = spec.layers + select_layer

    def key(self) -> str:
        """Names the weights, the block and the picture size: two towers with one key give the same features."""
        digest = hashlib.sha256(repr((self.spec, self.block)).encode())
        for name, value in self.visual.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in evaluation mode, whatever the rest of the model does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[I, 3, H, W] -> [I, P, C] patch features. uint8 levels are normalised here, floats are so already.

        Raises ValueError for another picture size.
        """
        size = self.spec.image_size
        if tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}; the tower takes [I, 3, {size}, {size}]")
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalise_levels(pixel_values, self.spec.image_mean, self.spec.image_std)
        dtype = self.visual.conv1.weight.dtype
        out = self.visual.forward_intermediates(
            pixel_values.to(dtype), indices=[self.block], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        return out["image_intermediates"][0]


def check_tower(name: str, pretrained: str | None, random_allowed: bool = False) -> None:
    """Raises ConfigError unless the tower exists and has weights; builds nothing."""
    if Path(name).is_dir():
        return
    if name not in open_clip.list_models():
        raise ConfigError(
            f"model.vision_tower={name!r} is neither a folder nor an open_clip model.\n"
            "  Use e.g. ViT-L-14-quickgelu with model.vision_pretrained=openai, or a folder with "
            f"{TOWER_CONFIG_FILE}."
        )
    if pretrained is None:
        problem = None if random_allowed else "its weights would be random"
    else:
        known = open_clip.get_pretrained_cfg(name, pretrained) or Path(pretrained).is_file()
        problem = None if known else "neither a tag of it nor a file"
    if problem:
        raise ConfigError(
            f"model.vision_pretrained={pretrained!r} with model.vision_tower={name!r}: {problem}.\n"
            f"  Give a file, or a tag: {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none is known'}."
        )


def build_tower(name: str, pretrained: str | None, select_layer: int) -> VisionTower:
    """The tower of a folder (``tower_config.json`` + ``model.safetensors``) or of an open_clip model.

    ``pretrained=None`` leaves an open_clip model random, for measurements; a recipe may not (``check_tower``).
    Build it outside any ZeRO-3 construction context: open_clip cannot load into partitioned parameters.

    Raises:
        ConfigError: neither a folder nor a name and tag that open_clip knows.
        CheckpointError: the folder is incomplete, or the weights do not fit or cannot be read or fetched.
    """
    folder = Path(name)
    if folder.is_dir():
        return _tower_from_folder(folder, select_layer)
    check_tower(name, pretrained, random_allowed=True)
    try:
        model = open_clip.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"model.vision_pretrained={pretrained!r} of {name} cannot be loaded: {error}\n"
            "  Check the file, or the connection to where the tag's weights are kept."
        ) from error
    config = open_clip.get_model_config(name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    vision_cfg = CLIPVisionCfg(**config["vision_cfg"])
    act = "quick_gelu" if config.get("quick_gelu", False) else "gelu"
    interpolation = preprocess.get("interpolation", "bicubic")
    spec = _make_spec(vision_cfg, act, preprocess["mean"], preprocess["std"], interpolation)
    return VisionTower(model.visual, spec, select_layer)


def build_tower_from_spec(spec: TowerSpec, select_layer: int) -> VisionTower:
    """A tower without weights, to be loaded by the caller."""
    config = CLIPVisionCfg(
        layers=spec.layers,
        width=spec.width,
        head_width=spec.width // spec.heads,
        patch_size=spec.patch_size,
        image_size=spec.image_size,
        mlp_ratio=spec.mlp_width / spec.width,
        norm_kwargs={"eps": spec.norm_eps},
    )
    # The projection to the joint embedding is never used: patch features leave before it.
    visual = _build_vision_tower(embed_dim=spec.width, vision_cfg=config, quick_gelu=spec.act == "quick_gelu")
    visual.proj = None
    return VisionTower(visual, spec, select_layer)


def tower_shapes(spec: TowerSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tower's weights; nothing is allocated."""
    with torch.device("meta"):
        tower = build_tower_from_spec(spec, -1)
    return {name: tuple(value.shape) for name, value in tower.state_dict().items()}


def tower_files(name: str, pretrained: str | None) -> list[Path]:
    """The files that ``build_tower`` reads; none for a random tower. A tag's file is downloaded where it is not yet.

    Raises CheckpointError when it cannot be.
    """
    if Path(name).is_dir():
        return [Path(name) / TOWER_CONFIG_FILE, Path(name) / "model.safetensors"]
    if pretrained is None:
        return []
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        return [Path(pretrained)]
    try:
        return [Path(open_clip.download_pretrained(tag))]
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model.vision_pretrained={pretrained!r} of {name} is not here and cannot be fetched: {error}"
        ) from error


def read_tower_spec(folder: Path) -> TowerSpec:
    """What the tower of a folder is. Raises CheckpointError when the folder is incomplete or its config is broken."""
    config_file = folder / TOWER_CONFIG_FILE
    missing = [str(file) for file in (config_file, folder / "model.safetensors") if not file.is_file()]
    if missing:
        raise CheckpointError(f"vision tower folder {folder} lacks {', '.join(missing)}; build or copy it again")
    try:
        raw = json.loads(config_file.read_text())
        vision_cfg = CLIPVisionCfg(**raw["vision_cfg"], norm_kwargs={"eps": raw["norm_eps"]})
        return _make_spec(vision_cfg, raw["act"], raw["image_mean"], raw["image_std"], raw["interpolation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config_file} cannot be read: {error}; build or copy the tower again") from error


def tower_config(spec: TowerSpec) -> dict[str, Any]:
    """What ``tower_config.json`` says of a tower: the inverse of ``read_tower_spec``."""
    vision_cfg = {
        "layers": spec.layers, "width": spec.width, "head_width": spec.width // spec.heads,
        "patch_size": spec.patch_size, "image_size": spec.image_size, "mlp_ratio": spec.mlp_width / spec.width,
    }
    return {
        "vision_cfg": vision_cfg, "norm_eps": spec.norm_eps, "act": spec.act, "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std), "interpolation": spec.interpolation,
    }


def _tower_from_folder(folder: Path, select_layer: int) -> VisionTower:
    spec = read_tower_spec(folder)
    weights_file = folder / "model.safetensors"
    tower = build_tower_from_spec(spec, select_layer)
    weights = {key: value for key, value in load_file(weights_file).items() if key != "proj"}
    result = tower.visual.load_state_dict(weights, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"{weights_file} does not fit its config: missing {result.missing_keys}, "
            f"unexpected {result.unexpected_keys}; build the tower again"
        )
    return tower


def _make_spec(config: CLIPVisionCfg, act: str, mean: Any, std: Any, interpolation: str) -> TowerSpec:
    if not isinstance(config.layers, int) or config.timm_model_name:
        raise ConfigError("only open_clip's own vision transformers are supported; choose a ViT-* model")
    return TowerSpec(
        image_size=int(config.image_size),
        patch_size=config.patch_size,
        width=config.width,
        layers=config.layers,
        heads=config.width // config.head_width,
        mlp_width=round(config.width * config.mlp_ratio),
        norm_eps=(config.norm_kwargs or {}).get("eps", 1e-5),
        act=act,
        image_mean=tuple(mean),
        image_std=tuple(std),
        interpolation=interpolation,
    )
