"""``config.json`` of the original LLaVA code: the LLM's, as transformers 4 wrote it, and that code's own keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llava_ds.checkpoint.formats.projector_file import PROJECTOR_NAMES
from llava_ds.checkpoint.json_file import read_json
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.errors import CheckpointError, ConfigError

CLASSES = {"llama": ("llava", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
"""Model type and class there by the LLM's model type; its code knows no other LLM (but MPT, which is not ours)."""

OWN_KEY = "llava_ds"
"""Of the config: what the code's own keys cannot say."""

_OLD_ROPE = ("default", "linear", "dynamic")  # what the transformers of that code knows
_NOT_OF_THE_LLM = (
    "mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_", "image_", "tokenizer_", "vision_config", "s2",
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "_name_or_path",
    OWN_KEY,
)
_OLD_KEYS = ("rope_parameters", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")


def check_writable(model: StoredModel) -> None:
    """Raises ConfigError that lists what the original code cannot hold of this model."""
    text, problems = model.text_config, []
    if text["model_type"] not in CLASSES:
        problems.append(f"its LLM is of the type {text['model_type']}; only {' and '.join(CLASSES)} are known there")
    rope = text.get("rope_parameters") or {"rope_type": "default"}
    if rope.get("rope_type") not in _OLD_ROPE:
        problems.append(f"its LLM has rope_type={rope.get('rope_type')}; only {', '.join(_OLD_ROPE)} are known there")
    heads, width = text.get("num_attention_heads", 1), text["hidden_size"]
    if text.get("head_dim") not in (None, width // heads):
        problems.append(f"its LLM has head_dim={text['head_dim']}; only {width // heads} (width by heads) fits there")
    if text.get("mlp_bias"):
        problems.append("its LLM has mlp_bias, which is not known there")
    if problems:
        raise ConfigError("the original layout cannot hold this model: " + "; ".join(problems))


def original_config(model: StoredModel, num_rows: int, tower_name: str | None) -> dict[str, Any]:
    """The ``config.json``: the LLM's, as transformers 4 wrote it, and the original code's own keys."""
    text = {key: value for key, value in model.text_config.items() if key not in _OLD_KEYS}
    model_type, architecture = CLASSES[text["model_type"]]
    rope = dict(model.text_config.get("rope_parameters") or {})
    kind = rope.get("rope_type", "default")
    config = {
        **text,
        "model_type": model_type,
        "architectures": [architecture],
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": num_rows,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": rope["factor"]},
        "mm_vision_tower": tower_name,
        "mm_hidden_size": model.tower.width,
        "mm_projector_type": model.projector,
        "mm_vision_select_layer": model.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": model.image_aspect_ratio,
        "tokenizer_padding_side": "right",
        OWN_KEY: {
            "template": model.template, "zero_features": model.zero_features, "tower": model.tower.as_dict(),
            "tower_name": model.tower_name,
        },
    }
    return config if tower_name else {key: value for key, value in config.items() if key != "mm_vision_tower"}


def read_original_config(folder: Path) -> dict[str, Any]:
    """The config of a folder. Raises CheckpointError that lists all that nothing here has."""
    config = read_json(folder / "config.json")
    expected = {
        "mm_projector_type": (*PROJECTOR_NAMES, None), "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None), "mm_patch_merge_type": ("flat", None), "s2": (False, None),
        "image_aspect_ratio": ("square", "pad", None),
    }
    problems = [f"{key}={config[key]!r}, known is {' or '.join(repr(value) for value in known if value is not None)}"
                for key, known in expected.items() if config.get(key) not in known]
    if _llm_type(config) not in CLASSES:
        problems.append(f"the LLM is {config.get('architectures') or config.get('model_type')}, known are "
                        + " and ".join(name for _, name in CLASSES.values()))
    if problems:
        raise CheckpointError(f"{folder / 'config.json'} has settings that nothing here has: {'; '.join(problems)}")
    return config


def _llm_type(config: Mapping[str, Any]) -> str | None:
    classes = {name: kind for kind, (_, name) in CLASSES.items()}
    types = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
    architectures = config.get("architectures")
    # By the class: the type "llava" was written of several.
    return classes.get(architectures[0]) if architectures else types.get(config.get("model_type", ""))


def text_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The LLM's transformers config as plain data, of a config of the original code."""
    own = {key: value for key, value in config.items() if not key.startswith(_NOT_OF_THE_LLM)}
    scaling = own.pop("rope_scaling", None) or {"type": "default"}
    rope = {"rope_type": scaling.get("rope_type", scaling.get("type")), "rope_theta": own.pop("rope_theta", 10000.0)}
    own["rope_parameters"] = {key: value for key, value in scaling.items() if key != "type"} | rope
    return dict(AutoConfig.for_model(str(_llm_type(config)), **own).to_dict())
