"""Vision towers on disk: ours (open_clip's names), and transformers' CLIP folders, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.json_file import read_json, write_json
from llava_ds.checkpoint.keymap import TOWER, Weights, list_some, strip_prefix, tower_from_clip, tower_to_clip
from llava_ds.checkpoint.layout import FileRecord
from llava_ds.checkpoint.lazy import LazyTensor, in_memory
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.checkpoint.tensor_files import find_weight_files, open_safetensors, open_tensors
from llava_ds.checkpoint.writer import Progress, write_safetensors
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.vision_tower import (
    TOWER_CONFIG_FILE,
    TowerSpec,
    build_tower,
    read_tower_spec,
    tower_config,
    tower_shapes,
)

_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # as PIL numbers them
_ACTS = ("quick_gelu", "gelu")
# Where a CLIP vision model's weights stand: alone (as transformers 5 and 4 write it), and within a LLaVA.
_PREFIXES = ("vision_model.", "vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.", "")
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class StoredTower:
    """A tower without its weights in memory; they have open_clip's names (ours below ``vision_tower.visual.``)."""

    spec: TowerSpec
    weights: Mapping[str, LazyTensor]


# open_clip's name and tag of OpenAI's towers -> transformers' hub; without quick-GELU they are other functions.
_PUBLISHED = {
    "ViT-B-32": "openai/clip-vit-base-patch32", "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14", "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}


def published_name(name: str, pretrained: str | None) -> str | None:
    """What transformers' hub calls an open_clip model, where it is one of OpenAI's; else None."""
    stem = name.removesuffix("-quickgelu")
    return _PUBLISHED.get(stem) if pretrained == "openai" and stem != name else None


def tower_of(model: StoredModel) -> StoredTower:
    """The tower of a whole model."""
    return StoredTower(model.tower, strip_prefix(model.weights, TOWER))


def read_tower(name: str, pretrained: str | None = None) -> StoredTower:
    """The tower of a folder (ours or a transformers CLIP) or of an open_clip model with its pretrained tag or file.

    Raises ConfigError when ``name`` is none of these; CheckpointError when it is incomplete or does not fit itself.
    """
    folder = Path(name)
    if (folder / TOWER_CONFIG_FILE).is_file():
        return read_tower_folder(folder)
    if (folder / "config.json").is_file():
        return read_clip(folder)
    if folder.is_dir():
        raise ConfigError(f"{folder} holds no vision tower (neither {TOWER_CONFIG_FILE} nor config.json)")
    if pretrained is None:
        raise ConfigError(
            f"the vision tower {name!r} is no folder here; for an open_clip model of that name say whose weights it "
            "has, too (--vision-pretrained, e.g. openai)"
        )
    built = build_tower(name, pretrained, select_layer=-1)
    weights = {key: in_memory(value, name) for key, value in built.visual.state_dict().items() if key != "proj"}
    return StoredTower(built.spec, weights)


def read_tower_folder(folder: Path) -> StoredTower:
    """Our own folder: ``tower_config.json`` and ``model.safetensors``.

    Raises CheckpointError when it is incomplete, or its weights do not fit its config.
    """
    weights = open_safetensors(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else {}
    tower = StoredTower(read_tower_spec(folder), {key: value for key, value in weights.items() if key != "proj"})
    check_tower_weights(tower, str(folder))
    return tower


def read_clip(folder: Path) -> StoredTower:
    """A transformers CLIP: its vision model alone, or with the text model, which is left.

    Raises CheckpointError when it is incomplete, is another kind of tower, or its weights do not fit its config.
    """
    clip = _vision_weights(open_tensors(find_weight_files(folder)))
    tower = StoredTower(read_clip_spec(folder), tower_from_clip(clip))
    check_tower_weights(tower, str(folder))
    return tower


def read_clip_spec(folder: Path) -> TowerSpec:
    """What the tower of a transformers CLIP folder is. Raises CheckpointError when it is of another kind."""
    config = read_json(folder / "config.json")
    return spec_from_clip(config.get("vision_config", config), read_image_processor(folder), str(folder))


def read_image_processor(folder: Path) -> dict[str, Any]:
    """The settings of a transformers folder's image processor, in the processor's file or, after that, in its own.

    Raises CheckpointError when there is none: the pictures' mean and deviation stand nowhere else.
    """
    nested, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if nested.is_file() and "image_processor" in (settings := read_json(nested)):
        return dict(settings["image_processor"])
    if alone.is_file():
        return read_json(alone)
    raise CheckpointError(
        f"{folder} says nowhere how its pictures are normalised (it has neither {alone.name} nor a {nested.name} with "
        "an image_processor); copy one from where the model was published"
    )


def _vision_weights(weights: Mapping[str, LazyTensor]) -> Weights:
    prefix = next((p for p in _PREFIXES if f"{p}embeddings.class_embedding" in weights), None)
    if prefix is None:
        raise CheckpointError(f"no CLIP vision model is among the weights, which are {list_some(weights)}")
    return strip_prefix(weights, prefix)


def spec_from_clip(config: Mapping[str, Any], images: Mapping[str, Any], where: str) -> TowerSpec:
    """What a tower is, by a transformers CLIP vision config and its image processor's settings.

    Raises CheckpointError that lists all that no tower of ours has.
    """
    # What a config leaves out is CLIPVisionConfig's default, which transformers' writers used to leave out.
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
        **config,
    }
    crop = images.get("crop_size", vision["image_size"])
    resample = {number: name for name, number in _RESAMPLE.items()}
    checks = {
        "model_type": (vision.get("model_type", "clip_vision_model"), ("clip_vision_model",)),
        "hidden_act": (vision["hidden_act"], _ACTS),
        "num_channels": (vision["num_channels"], (3,)),
        "resample": (images.get("resample", 3), tuple(resample)),
        "crop_size": (crop["height"] if isinstance(crop, Mapping) else crop, (vision["image_size"],)),
    }
    problems = [f"{key} is {found!r}, not {' or '.join(map(str, known))}"
                for key, (found, known) in checks.items() if found not in known]
    if problems:
        raise CheckpointError(f"{where}: the vision tower is of another kind: {'; '.join(problems)}")
    return TowerSpec(
        image_size=vision["image_size"], patch_size=vision["patch_size"], width=vision["hidden_size"],
        layers=vision["num_hidden_layers"], heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"], norm_eps=vision["layer_norm_eps"], act=vision["hidden_act"],
        image_mean=tuple(images.get("image_mean", _OPENAI_MEAN)),
        image_std=tuple(images.get("image_std", _OPENAI_STD)),
        interpolation=resample[images.get("resample", 3)],
    )


def relative_layer(layer: int, tower: TowerSpec) -> int:
    """Which block's output a layer of transformers, or of the original code, is: counted from the end.

    Their layer 0 is what goes into the first block. Raises ConfigError when the tower has no such block.
    """
    relative = layer if layer < 0 else layer - tower.layers - 1
    if not -tower.layers <= relative <= -1:
        raise ConfigError(
            f"the features are of layer {layer}, but the tower has {tower.layers} blocks; -1 (the last) to "
            f"-{tower.layers} can be, or 1 to {tower.layers}"
        )
    return relative


def spec_of_openai(clip: Mapping[str, LazyTensor]) -> TowerSpec:
    """What a tower is, by the weights alone: only of those of OpenAI, whose heads are 64 wide and whose act is one.

    ``clip`` has transformers' names. Raises CheckpointError where one is missing.
    """
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
              "encoder.layers.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in clip]
    if missing:
        raise CheckpointError(f"the CLIP vision model lacks {', '.join(missing)}; give a whole one")
    (width, _, patch, _), (positions, _), (mlp_width, _) = (clip[name].shape for name in needed)
    layers = len({name.split(".")[2] for name in clip if name.startswith("encoder.layers.")})
    return TowerSpec(
        image_size=round((positions - 1) ** 0.5) * patch, patch_size=patch, width=width, layers=layers,
        heads=width // 64, mlp_width=mlp_width, norm_eps=1e-5, act="quick_gelu", image_mean=_OPENAI_MEAN,
        image_std=_OPENAI_STD, interpolation="bicubic",
    )


def check_tower_weights(tower: StoredTower, where: str) -> None:
    """Raises CheckpointError that lists every weight that is missing, unknown or of another shape than the spec's."""
    expected = {name.removeprefix("visual."): shape for name, shape in tower_shapes(tower.spec).items()}
    problems = [f"{name} is missing" for name in expected.keys() - tower.weights.keys()]
    problems += [f"{name} is unknown" for name in tower.weights.keys() - expected.keys()]
    problems += [f"{name} is {tower.weights[name].shape}, the config says {shape}"
                 for name, shape in expected.items() if name in tower.weights and tower.weights[name].shape != shape]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise CheckpointError(f"{where}: the tower's weights do not fit its config:\n  {listed}")


def clip_config(spec: TowerSpec) -> dict[str, Any]:
    """transformers' CLIP vision config of a tower."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_channels": 3,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": spec.act,
        "layer_norm_eps": spec.norm_eps,
        "projection_dim": spec.width,
    }


def clip_image_processor(spec: TowerSpec) -> dict[str, Any]:
    """transformers' ``preprocessor_config.json`` of a tower: resize, centre crop, normalise."""
    side = spec.image_size
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side},
        "resample": _RESAMPLE[spec.interpolation], "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(spec.image_mean), "image_std": list(spec.image_std),
        "do_convert_rgb": True,
    }


def write_clip(
    tower: StoredTower, folder: Path, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, FileRecord]:
    """Writes a transformers CLIPVisionModel with its image processor; returns the records of the files with tensors.

    The names begin with ``vision_model.``, which every version of transformers reads.
    """
    config = {"architectures": ["CLIPVisionModel"], **clip_config(tower.spec), "torch_dtype": _name(dtype)}
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", clip_image_processor(tower.spec))
    tensors = [(f"vision_model.{name}", value.cast(dtype)) for name, value in tower_to_clip(tower.weights).items()]
    return {"model.safetensors": write_safetensors(folder / "model.safetensors", tensors, progress, verify=True)}


def write_tower_folder(
    tower: StoredTower, folder: Path, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, FileRecord]:
    """Writes our own folder; returns the records of the files with tensors."""
    write_json(folder / TOWER_CONFIG_FILE, tower_config(tower.spec))
    tensors = [(name, value.cast(dtype)) for name, value in tower.weights.items()]
    return {"model.safetensors": write_safetensors(folder / "model.safetensors", tensors, progress, verify=True)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
