"""A LLaVA written as transformers' LlavaForConditionalGeneration, in llava-hf's layout, which vLLM reads, too."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint import keymap
from llava_ds.checkpoint.formats.clip import clip_config
from llava_ds.checkpoint.json_file import write_json
from llava_ds.checkpoint.keymap import HF_LLM, HF_PROJECTOR, HF_TOWER, LLM, PROJECTOR, TOWER, add_prefix, strip_prefix
from llava_ds.checkpoint.layout import FileRecord
from llava_ds.checkpoint.lazy import PIECE_ELEMENTS, LazyTensor, concatenated
from llava_ds.checkpoint.processor import PAD_TOKEN, build_processor, generation_settings
from llava_ds.checkpoint.recognise import MERGED_FILE
from llava_ds.checkpoint.stored_model import StoredModel, copy_tokenizer_model
from llava_ds.checkpoint.writer import Progress, write_sharded
from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.models.build import describe_llm

_ROWS_MULTIPLE = 64


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
    copy_tokenizer_model(model, folder)
    write_json(folder / "config.json", _config(model, processor.tokenizer, num_rows))
    write_json(folder / "generation_config.json", generation_settings(model, processor.tokenizer))
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
    write_json(folder / MERGED_FILE, facts)


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
        "vision_config": clip_config(spec),
    }
