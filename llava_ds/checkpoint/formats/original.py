"""The layout of the original LLaVA code: the LLM's folder, with projector and tower among its weights.

Its LLM has no word ``<image>``: the two words that transformers' layout adds are left out on the way here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llava_ds.checkpoint.formats.clip import (
    StoredTower,
    check_tower_weights,
    read_clip,
    read_clip_spec,
    spec_of_openai,
    tower_of,
    write_clip,
)
from llava_ds.checkpoint.formats.llm import check_llm_weights, without_derived
from llava_ds.checkpoint.formats.projector_file import (
    PROJECTOR_NAMES,
    check_projector,
    kind_of_projector,
    projector_widths,
)
from llava_ds.checkpoint.keymap import (
    LLM,
    PROJECTOR,
    TOWER,
    Weights,
    add_prefix,
    list_some,
    strip_prefix,
    tower_from_clip,
    tower_to_clip,
)
from llava_ds.checkpoint.layout import FileRecord, reading
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.checkpoint.tensor_files import find_weight_files, open_tensors
from llava_ds.checkpoint.writer import Progress, write_sharded
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.build import load_tokenizer
from llava_ds.models.vision_tower import TowerSpec
from llava_ds.text.sentencepiece_tokenizer import is_llama_like
from llava_ds.text.templates import CHAT_TEMPLATE

CLASSES = {"llama": ("llava", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
"""Model type and class there by the LLM's model type; its code knows no other LLM (but MPT, which is not ours)."""

TOWER_FOLDER = "vision_tower"
_PROJECTOR = "model.mm_projector."
_ANY_TOWER = "model.vision_tower."
_TOWER = f"{_ANY_TOWER}vision_tower.vision_model."
_OWN_KEY = "llava_ds"  # of config.json: what its own keys cannot say
_PAD = "<pad>"
_OLD_ROPE = ("default", "linear", "dynamic")  # what the transformers of that code knows
_NOT_OF_THE_LLM = (
    "mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_", "image_", "tokenizer_", "vision_config", "s2",
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "_name_or_path",
    _OWN_KEY,
)


def write_original(
    model: StoredModel, folder: Path, max_shard_bytes: int, progress: Progress | None = None,
    final: Path | None = None, tokenizer_model: Path | None = None,
) -> tuple[dict[str, FileRecord], list[str]]:
    """Writes a folder that the original code loads; ``final`` is where it will stand, if not at ``folder``.

    The code loads its tower by ``mm_vision_tower``: where that is not a published one by name, the tower is written
    as a folder of its own as well. ``tokenizer_model`` is the LLM's SentencePiece file, without which its slow
    tokenizer cannot be made.

    Returns the records of the files with tensors, and what a user should know. Raises ConfigError for an LLM that the
    code does not know, or with settings that it lacks.
    """
    check_writable(model)
    num_rows, num_words = own_vocabulary(model)
    weights = strip_prefix(model.weights, LLM)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name].rows(0, num_rows)
    weights |= add_prefix(strip_prefix(model.weights, PROJECTOR), _PROJECTOR)
    weights |= add_prefix(tower_to_clip(strip_prefix(model.weights, TOWER)), _TOWER)
    tensors = [(name, value.cast(model.dtype)) for name, value in weights.items()]
    records = write_sharded(folder, tensors, max_shard_bytes, progress)
    notes = []
    tower_name = model.tower_name
    if tower_name is None:
        (folder / TOWER_FOLDER).mkdir()
        inner = write_clip(tower_of(model), folder / TOWER_FOLDER, model.dtype, progress)
        records |= {f"{TOWER_FOLDER}/{name}": record for name, record in inner.items()}
        tower_name = str((final or folder).absolute() / TOWER_FOLDER)
        notes.append(
            f"the original code loads the tower from mm_vision_tower={tower_name}; where the folder moves, change that "
            "in its config.json"
        )
    _write_json(folder / "config.json", original_config(model, num_rows, tower_name))
    notes += _write_tokenizer(model, folder, num_words, tokenizer_model)
    if "llava" not in (final or folder).name.lower():
        notes.append("the original code goes by the folder's name: give it one with 'llava' in it")
    if model.zero_features:
        notes.append("the model was trained blind (model.zero_features); other code will show it the pictures")
    return records, notes


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


def own_vocabulary(model: StoredModel) -> tuple[int, int]:
    """Rows of the word embedding, and words of the tokenizer, without those that transformers' layout adds.

    That are ``<image>`` and ``<pad>`` at the tokenizer's very end; their rows, and those that fill up the last 64, are
    taken away where nothing else explains them.
    """
    rows, words = model.text_config["vocab_size"], len(model.tokenizer)
    vocabulary = model.tokenizer.get_added_vocab()
    added = sorted(vocabulary[word] for word in (IMAGE_PLACEHOLDER, _PAD) if word in vocabulary)
    if IMAGE_PLACEHOLDER in vocabulary:
        for last in (added, [vocabulary[IMAGE_PLACEHOLDER]]):
            first = words - len(last)
            if last == list(range(first, words)):
                return (first if rows in (words, -(-words // 64) * 64) else rows), first
    return rows, words


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
        _OWN_KEY: {
            "template": model.template, "zero_features": model.zero_features, "tower": model.tower.as_dict(),
            "tower_name": model.tower_name,
        },
    }
    return config if tower_name else {key: value for key, value in config.items() if key != "mm_vision_tower"}


_OLD_KEYS = ("rope_parameters", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")


def _write_tokenizer(model: StoredModel, folder: Path, num_words: int, tokenizer_model: Path | None) -> list[str]:
    """Writes the tokenizer's first ``num_words`` words; returns what a user should know.

    Raises CheckpointError when what was written reads back as another tokenizer.
    """
    tokenizer = model.tokenizer
    expected = {word: number for word, number in tokenizer.get_vocab().items() if number < num_words}
    if tokenizer_model is not None and is_llama_like(tokenizer_model):
        shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
        _write_json(folder / "tokenizer_config.json", _slow_tokenizer_config(model, num_words))
        if load_tokenizer(str(folder)).get_vocab() == expected:
            return []
        (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    if model.template != CHAT_TEMPLATE:  # an exported processor's, which would not be asked for its pictures here
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    _cut_vocabulary(folder, num_words)
    found = load_tokenizer(str(folder)).get_vocab()
    if found != expected:
        differing = sorted(word for word in found.keys() | expected.keys() if found.get(word) != expected.get(word))
        raise CheckpointError(
            f"{folder}: the tokenizer reads back with {len(found)} words, {len(expected)} were written; they differ in "
            f"{list_some(differing)}"
        )
    if model.text_config["model_type"] == "mistral":
        return []
    return [
        "there is no tokenizer.model that makes this tokenizer, and the original code's LLaMA asks for one: copy the "
        "LLM's into the folder"
    ]


def _slow_tokenizer_config(model: StoredModel, num_words: int) -> dict[str, Any]:
    tokenizer = model.tokenizer
    added = {
        str(number): {"content": token.content, "special": token.special, "lstrip": token.lstrip,
                      "rstrip": token.rstrip, "normalized": token.normalized, "single_word": token.single_word}
        for number, token in sorted(tokenizer.added_tokens_decoder.items()) if number < num_words
    }
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    kept = {name: text for name, text in names.items()
            if text is not None and tokenizer.convert_tokens_to_ids(text) < num_words}
    config = {
        "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, "add_bos_token": True,
        "add_eos_token": False, "legacy": True, "model_max_length": tokenizer.model_max_length, "padding_side": "right",
        **kept,
    }
    return config | ({"chat_template": tokenizer.chat_template} if model.template == CHAT_TEMPLATE else {})


def _cut_vocabulary(folder: Path, num_words: int) -> None:
    """Takes the added words from ``num_words`` on out of a saved fast tokenizer."""
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    gone = {token["content"] for token in raw["added_tokens"] if token["id"] >= num_words}
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < num_words]
    file.write_text(json.dumps(raw, ensure_ascii=False) + "\n")
    file = folder / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items()
              if not (isinstance(value, str) and value in gone) and key not in ("processor_class", "image_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), list):
            config[key] = [word for word in config[key] if word not in gone]
        elif isinstance(config.get(key), dict):
            config[key] = {name: word for name, word in config[key].items() if word not in gone}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            number: token for number, token in config["added_tokens_decoder"].items() if int(number) < num_words
        }
    _write_json(file, config)


def read_original(
    folder: Path, template: str | None = None, tower: StoredTower | None = None, select_layer: int | None = None,
    image_aspect_ratio: str | None = None,
) -> StoredModel:
    """The model of a folder that the original code wrote, or ``write_original``.

    What is given replaces what the folder says; no folder of the original code says the template.

    Raises:
        ConfigError: the template or the tower is missing and not given.
        CheckpointError: the folder is incomplete, its weights do not fit its config, or nothing here has its settings.
    """
    config = _read_config(folder)
    own = config.get(_OWN_KEY, {})
    everything = open_tensors(find_weight_files(folder))
    parts = _llm_and_projector(folder, config, everything)
    given, tower = tower, tower or _find_tower(folder, config, everything)
    template = template or own.get("template")
    lacking = ["--template, the conversation template that it was trained with"] if template is None else []
    if tower is None:
        name = config.get("mm_vision_tower")
        lacking.append(f"--vision-tower (and --vision-pretrained), which its config calls {name!r}")
    if tower is None or template is None:
        raise ConfigError(f"{folder} does not hold all of the model; give {'; and '.join(lacking)}")
    vision_width, width = projector_widths(strip_prefix(parts, PROJECTOR))
    if vision_width != tower.spec.width:
        raise CheckpointError(
            f"{folder}: the projector is made for a tower of width {vision_width}, and this one's is {tower.spec.width}"
        )
    published = own.get("tower_name") if own else _published(config.get("mm_vision_tower"))
    return StoredModel(
        weights=add_prefix(tower.weights, TOWER) | parts, text_config=text_config_of(config), tower=tower.spec,
        select_layer=relative_layer(
            config.get("mm_vision_select_layer", -2) if select_layer is None else select_layer, tower.spec
        ),
        projector=config.get("mm_projector_type", "linear"), tokenizer=load_tokenizer(str(folder)), template=template,
        image_aspect_ratio=image_aspect_ratio or config.get("image_aspect_ratio") or "square",
        zero_features=own.get("zero_features", False), dtype=parts[f"{LLM}model.embed_tokens.weight"].dtype,
        tower_name=None if given else published,
    )


def relative_layer(layer: int, tower: TowerSpec) -> int:
    """Which block's output a layer of that code is, counted from the end; its layer 0 is before the first block."""
    return layer if layer < 0 else layer - tower.layers - 1


def read_original_weights(folder: Path) -> Weights:
    """LLM and projector of a folder of the original code, by our names: what a run may start from.

    Raises CheckpointError as ``read_original`` does.
    """
    return _llm_and_projector(folder, _read_config(folder), open_tensors(find_weight_files(folder)))


def _read_config(folder: Path) -> dict[str, Any]:
    with reading(folder / "config.json") as file:
        config: dict[str, Any] = json.loads(file.read_text())
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


def _llm_and_projector(folder: Path, config: Mapping[str, Any], everything: Mapping[str, LazyTensor]) -> Weights:
    text_config = text_config_of(config)
    projector = strip_prefix(everything, _PROJECTOR)
    kind = config.get("mm_projector_type") or "linear"
    if kind_of_projector(projector) != kind:
        found = list_some(sorted(projector)) or "no weights"
        raise CheckpointError(f"{folder}: mm_projector_type is {kind}, but its projector has {found}")
    check_projector(projector, str(folder))
    llm = {name: value for name, value in everything.items() if not name.startswith((_PROJECTOR, _ANY_TOWER))}
    llm = without_derived(llm, bool(text_config.get("tie_word_embeddings")))
    check_llm_weights(text_config, llm, str(folder))
    if projector_widths(projector)[1] != text_config["hidden_size"]:
        raise CheckpointError(
            f"{folder}: the projector is made for an LLM of width {projector_widths(projector)[1]}, and this one's is "
            f"{text_config['hidden_size']}"
        )
    return add_prefix(projector, PROJECTOR) | add_prefix(llm, LLM)


def _find_tower(
    folder: Path, config: Mapping[str, Any], everything: Mapping[str, LazyTensor]
) -> StoredTower | None:
    """The tower among the weights, or else where ``mm_vision_tower`` names a folder."""
    name = config.get("mm_vision_tower") or ""
    places = [place for place in (folder / TOWER_FOLDER, Path(name)) if (place / "config.json").is_file() and name]
    clip = strip_prefix(everything, _TOWER)
    if not clip:
        left = [key for key in everything if key.startswith(_ANY_TOWER)]
        if left:
            raise CheckpointError(f"{folder}: the tower's weights have other names than {_TOWER}*: {list_some(left)}")
        return read_clip(places[0]) if places else None
    if _OWN_KEY in config:
        spec = TowerSpec.from_dict(config[_OWN_KEY]["tower"])
    elif places:
        spec = read_clip_spec(places[0])
    elif _published(name):
        spec = spec_of_openai(clip)
    else:
        return None  # weights without a config: heads and activation stand nowhere
    tower = StoredTower(spec, tower_from_clip(clip))
    check_tower_weights(tower, str(folder))
    return tower


def _published(name: str | None) -> str | None:
    return name if name and name.startswith("openai/clip-vit-") else None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
