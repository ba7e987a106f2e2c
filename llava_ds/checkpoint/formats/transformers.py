"""LlavaForConditionalGeneration of transformers, in llava-hf's layout, which vLLM reads, too."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from llava_ds.checkpoint import keymap
from llava_ds.checkpoint.formats.llm import check_llm_weights, without_derived
from llava_ds.checkpoint.keymap import HF_PROJECTOR, LLM, PROJECTOR, TOWER, add_prefix, strip_prefix
from llava_ds.checkpoint.layout import FileRecord, find_damage, read_manifest, reading
from llava_ds.checkpoint.lazy import PIECE_ELEMENTS, LazyTensor, concatenated
from llava_ds.checkpoint.processor import PAD_TOKEN, build_processor, generation_settings
from llava_ds.checkpoint.recognise import MERGED_FILE
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.checkpoint.tensor_files import find_weight_files, open_tensors
from llava_ds.checkpoint.writer import Progress, write_sharded
from llava_ds.constants import COMPLETE_MARKER, IMAGE_PLACEHOLDER
from llava_ds.errors import CheckpointError
from llava_ds.models.build import describe_llm, load_tokenizer
from llava_ds.models.vision_tower import TowerSpec

HF_TOWER = "vision_tower.vision_model."
HF_LLM = "language_model."
_ROWS_MULTIPLE = 64
USUAL_TEMPLATE = "v1"  # of LLaVA-1.5
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
Log = Callable[[str], None]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def write_transformers(
    model: StoredModel, folder: Path, max_shard_bytes: int, progress: Progress | None = None
) -> dict[str, FileRecord]:
    """Writes a model into an existing folder; returns the records of the files with tensors.

    It has two more words than the model's LLM, ``<image>`` and ``<pad>``, as transformers needs them; their rows are
    never read, and never the likeliest next word.

    Raises CheckpointError when a file cannot be written.
    """
    write_settings(model, folder)
    return write_sharded(folder, plan_transformers(model), max_shard_bytes, progress)


def write_settings(model: StoredModel, folder: Path) -> None:
    """Writes all but the weights: configs, processor, chat template, generation settings, and our own facts."""
    processor = build_processor(model)
    num_rows = _count_rows(model, len(processor.tokenizer))
    processor.save_pretrained(folder)
    _write_json(folder / "config.json", _config(model, processor.tokenizer, num_rows))
    _write_json(folder / "generation_config.json", generation_settings(model, processor.tokenizer))
    facts = {
        "tower": model.tower.as_dict(),
        "select_layer": model.select_layer,
        "projector": model.projector,
        "projector_export": projector_export(model),
        "zero_features": model.zero_features,
        "template": model.template,
        "image_aspect_ratio": model.image_aspect_ratio,
        "num_words": model.text_config["vocab_size"],
    }
    _write_json(folder / MERGED_FILE, facts)


def plan_transformers(model: StoredModel) -> list[tuple[str, LazyTensor]]:
    """Name and tensor of everything that is written, in its order and precision; no weight is read yet."""
    num_rows = _count_rows(model, len(build_processor(model).tokenizer))
    tables = describe_llm(model.text_config).word_tables
    llm = {
        name: _grown(value, num_rows) if name in tables else value
        for name, value in strip_prefix(model.weights, LLM).items()
    }
    parts = {
        **add_prefix(keymap.tower_to_clip(strip_prefix(model.weights, TOWER)), HF_TOWER),
        **add_prefix(_projector(model), HF_PROJECTOR),
        **add_prefix(llm, HF_LLM),
    }
    return [(name, _as_stored(value, model.dtype)) for name, value in parts.items()]


def _as_stored(value: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return value.cast(dtype) if value.dtype.is_floating_point else value


def projector_export(model: StoredModel) -> str:
    """How the projector is written, see ``choose_projector_export``."""
    return keymap.choose_projector_export(
        model.projector, model.tower.width, _llm_width(model), model.projector_act
    )


def _llm_width(model: StoredModel) -> int:
    biases = (name for name in ("2.bias", "bias") if PROJECTOR + name in model.weights)
    return model.weights[PROJECTOR + next(biases)].shape[0]


def _count_rows(model: StoredModel, num_words: int) -> int:
    """Rows of the word tables: as they are where all words fit, else a multiple of 64, as transformers' own export."""
    own = int(model.text_config["vocab_size"])
    return own if num_words <= own else -(-num_words // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def _grown(table: LazyTensor, num_rows: int) -> LazyTensor:
    """A table of words with more rows, each of them the mean of all.

    A mean of logits is never the largest: no answer changes. Random rows could win.
    """
    num_new = num_rows - table.shape[0]
    if num_new <= 0:
        return table
    width = table.numel // table.shape[0]

    @functools.cache
    def mean() -> torch.Tensor:
        total, step = torch.zeros(width, dtype=torch.float64), max(1, PIECE_ELEMENTS // width)
        for start in range(0, table.shape[0], step):
            block = table.rows(start, min(table.shape[0], start + step)).whole()
            total += block.reshape(-1, width).double().sum(0)
        return (total / table.shape[0]).float()

    def read(start: int, stop: int) -> torch.Tensor:
        return mean()[torch.arange(start, stop) % width]

    new = LazyTensor(table.dtype, (num_new, *table.shape[1:]), read, table.origin)
    return concatenated([table, new])


def _projector(model: StoredModel) -> dict[str, LazyTensor]:
    """The projector as transformers' two layers, made when the first of them is read."""
    export, own = projector_export(model), strip_prefix(model.weights, PROJECTOR)
    if export == "mlp":
        return keymap.projector_to_hf(own, export)
    vision_width, width = model.tower.width, _llm_width(model)
    shapes = {
        "linear_1.weight": (width, vision_width), "linear_1.bias": (width,),
        "linear_2.weight": (width, width), "linear_2.bias": (width,),
    }

    @functools.cache
    def made() -> dict[str, LazyTensor]:
        return keymap.projector_to_hf({name: value.cast(model.dtype) for name, value in own.items()}, export)

    def deferred(name: str) -> LazyTensor:
        return LazyTensor(
            model.dtype, shapes[name], lambda start, stop: made()[name].read(start, stop), own["weight"].origin
        )

    return {name: deferred(name) for name in shapes}


def _config(model: StoredModel, tokenizer: Any, num_rows: int) -> dict[str, Any]:
    spec, dtype = model.tower, str(model.dtype).removeprefix("torch.")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_seq_length": spec.num_patches,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD_TOKEN),
        "projector_hidden_act": keymap.PROJECTOR_ACTS[projector_export(model)],
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(model.text_config["tie_word_embeddings"]),
        "vision_feature_layer": model.select_layer,
        "vision_feature_select_strategy": "default",
        "text_config": model.text_config | {"vocab_size": num_rows, "dtype": dtype},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": spec.width,
            "intermediate_size": spec.mlp_width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "image_size": spec.image_size,
            "patch_size": spec.patch_size,
            "hidden_act": spec.act,
            "layer_norm_eps": spec.norm_eps,
            "projection_dim": spec.width,
        },
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def read_transformers(
    folder: Path, template: str | None = None, log: Log = _say, committed: bool = True
) -> StoredModel:
    """The model of a folder that ``write_transformers`` wrote, or of any llava-hf folder, in any of its four layouts.

    ``template`` is needed where the folder does not say how the model was trained; ``log`` is told when it is guessed.

    Raises CheckpointError when the folder is not whole, or holds something else than LLaVA with a CLIP tower.
    """
    facts = _read_facts(folder, committed)
    config = _read_config(folder)
    weights = keymap.llava_hf_names(open_tensors(find_weight_files(folder)))
    tokenizer = load_tokenizer(str(folder))
    llm, text_config = _read_llm(folder, config, weights)
    text_config["vocab_size"] = min(
        facts.get("num_words") or _count_own_words(config, tokenizer), text_config["vocab_size"]
    )
    tables = describe_llm(text_config).word_tables
    llm = {n: value.rows(0, text_config["vocab_size"]) if n in tables else value for n, value in llm.items()}
    images = _read_image_settings(folder)
    tower = TowerSpec.from_dict(facts["tower"]) if facts else _tower_spec(folder, config.vision_config, images)
    projector, export = _read_projector(config, facts, weights)
    if template is None and not facts:
        log(f"{folder} does not say which template it was trained with: {USUAL_TEMPLATE} is taken, LLaVA-1.5's")
    return StoredModel(
        weights={
            **add_prefix(keymap.tower_from_clip(strip_prefix(weights, HF_TOWER)), TOWER),
            **add_prefix(projector, PROJECTOR),
            **add_prefix(llm, LLM),
        },
        text_config=text_config,
        tower=tower,
        select_layer=_relative_layer(config.vision_feature_layer, tower),
        projector="mlp2x_gelu" if export == "mlp" else "linear",
        tokenizer=tokenizer,
        template=template or facts.get("template", USUAL_TEMPLATE),
        image_aspect_ratio=facts.get("image_aspect_ratio") or ("pad" if images.get("do_pad") else "square"),
        zero_features=facts.get("zero_features", False),
        dtype=_dtype(config, llm),
    )


def read_transformers_weights(folder: Path) -> dict[str, LazyTensor]:
    """LLM and projector of such a folder, by our names: what a run may start from.

    The tables of words are whole, with the rows of words that an export added. Raises CheckpointError as
    ``read_transformers`` does.
    """
    facts, config = _read_facts(folder, committed=True), _read_config(folder)
    weights = keymap.llava_hf_names(open_tensors(find_weight_files(folder)))
    projector, _ = _read_projector(config, facts, weights)
    return add_prefix(projector, PROJECTOR) | add_prefix(_read_llm(folder, config, weights)[0], LLM)


def _read_projector(
    config: Any, facts: Mapping[str, Any], weights: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], str]:
    """The projector, and how it is written."""
    stored = strip_prefix(weights, HF_PROJECTOR)
    export = facts.get("projector_export") or keymap.recognise_projector(stored, config.projector_hidden_act)
    return keymap.projector_from_hf(stored, export), export


def _read_llm(
    folder: Path, config: Any, weights: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The LLM's weights, which must be those that its config names, and that config."""
    text_config, llm = config.text_config.to_dict(), strip_prefix(weights, HF_LLM)
    text_config["tie_word_embeddings"] = "lm_head.weight" not in llm
    llm = without_derived(llm, text_config["tie_word_embeddings"])
    check_llm_weights(text_config, llm, str(folder))
    return llm, text_config


def _relative_layer(layer: int, tower: TowerSpec) -> int:
    """transformers counts the embeddings as output 0, ours counts blocks from the end."""
    return layer if layer < 0 else layer - tower.layers - 1


def _read_facts(folder: Path, committed: bool) -> dict[str, Any]:
    """What our own export says beside the weights; nothing where another wrote the folder."""
    if not (folder / MERGED_FILE).is_file():
        return {}
    if not committed:
        with reading(folder / MERGED_FILE) as file:
            return dict(json.loads(file.read_text()))
    if not (folder / COMPLETE_MARKER).is_file():
        raise CheckpointError(f"{folder} is not complete (no {COMPLETE_MARKER}); merge again")
    # The other files may be edited by whoever serves the model.
    names = [n for n in read_manifest(folder) if n.endswith(".safetensors") or n in ("config.json", MERGED_FILE)]
    problems = find_damage(folder, names, hashes=False)
    if problems:
        raise CheckpointError(f"{folder} is damaged:\n  " + "\n  ".join(problems) + "\n  Copy it or merge again.")
    with reading(folder / MERGED_FILE) as file:
        return dict(json.loads(file.read_text()))


def _read_config(folder: Path) -> Any:
    with reading(folder / "config.json") as file:
        raw = json.loads(file.read_text())
        kind, strategy = raw.get("model_type"), raw.get("vision_feature_select_strategy", "default")
        config = LlavaConfig.from_pretrained(folder)
    vision = config.vision_config
    wanted = {
        "model_type": (kind, "llava"),
        "vision_config.model_type": (vision.model_type, "clip_vision_model"),
        "vision_feature_select_strategy": (strategy, "default"),
    }
    problems = [f"{key} is {found!r}, {known!r} is needed" for key, (found, known) in wanted.items() if found != known]
    act = getattr(vision, "hidden_act", None)
    if act not in ("quick_gelu", "gelu"):
        problems.append(f"vision_config.hidden_act is {act!r}, quick_gelu or gelu is needed")
    if not isinstance(config.vision_feature_layer, int):
        problems.append(f"vision_feature_layer is {config.vision_feature_layer}, one layer is needed")
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{folder / 'config.json'} is of a model that is not known here:\n  {lines}")
    return config


def _count_own_words(config: Any, tokenizer: Any) -> int:
    """Words of the LLM itself, where an export has added ``<image>`` and ``<pad>`` behind them; else all."""
    added = {config.image_token_index, tokenizer.convert_tokens_to_ids(PAD_TOKEN)}
    first = len(tokenizer) - 2
    is_added = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) in added and added == {first, first + 1}
    return first if is_added else int(config.text_config.vocab_size)


def _read_image_settings(folder: Path) -> dict[str, Any]:
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (folder / name).is_file():
            with reading(folder / name) as file:
                raw = json.loads(file.read_text())
            if key is None or key in raw:
                return dict(raw if key is None else raw[key])
    raise CheckpointError(
        f"{folder} has neither a processor_config.json with an image_processor nor a preprocessor_config.json; copy one"
    )


def _tower_spec(folder: Path, vision: Any, images: Mapping[str, Any]) -> TowerSpec:
    missing = [key for key in ("image_mean", "image_std") if key not in images]
    if missing or images.get("resample", 3) not in _FILTERS:
        raise CheckpointError(
            f"{folder}: the image processor lacks {', '.join(missing)}" if missing else
            f"{folder}: the image processor resizes with filter {images['resample']}; known are {_FILTERS}"
        )
    return TowerSpec(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        norm_eps=vision.layer_norm_eps,
        act=vision.hidden_act,
        image_mean=tuple(images["image_mean"]),
        image_std=tuple(images["image_std"]),
        interpolation=_FILTERS[images.get("resample", 3)],
    )


def _dtype(config: Any, llm: Mapping[str, LazyTensor]) -> torch.dtype:
    """The precision of the folder: what config.json says, else the LLM's own."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next(value.dtype for value in llm.values() if value.dtype.is_floating_point)
