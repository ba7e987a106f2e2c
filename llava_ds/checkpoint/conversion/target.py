"""The side that a conversion writes: the files of a layout, read back, and compared with what the source computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llava_ds.checkpoint import parity
from llava_ds.checkpoint.conversion.request import Job
from llava_ds.checkpoint.conversion.source import read_model, read_projector, read_tower
from llava_ds.checkpoint.formats import clip, projector_file
from llava_ds.checkpoint.formats.gguf import write_gguf
from llava_ds.checkpoint.formats.original import read_original
from llava_ds.checkpoint.formats.original_config import check_writable, original_config
from llava_ds.checkpoint.formats.original_export import own_vocabulary, write_original
from llava_ds.checkpoint.formats.transformers import read_transformers
from llava_ds.checkpoint.formats.transformers_export import projector_export
from llava_ds.checkpoint.json_file import write_json
from llava_ds.checkpoint.keymap import PROJECTOR, TOWER, Weights, choose_projector_export, strip_prefix
from llava_ds.checkpoint.layout import FileRecord
from llava_ds.checkpoint.merge import write_and_check
from llava_ds.checkpoint.new_folder import check_room
from llava_ds.checkpoint.parity import Comparison
from llava_ds.checkpoint.recognise import PROJECTOR_FILE
from llava_ds.checkpoint.shard_size import MAX_SHARD_BYTES
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.errors import ConfigError
from llava_ds.text.chat_template import resolve_template
from llava_ds.text.encode import stop_string

Outcome = tuple[dict[str, FileRecord], list[Comparison]]


def write_target(job: Job) -> Outcome:
    """Writes what is asked for into ``job.work``; returns the records of the files with tensors, and what was compared.

    Raises ConfigError or CheckpointError when the source is incomplete, does not fit the layout, or cannot be written.
    """
    return _WRITERS[job.target_layout](job)


def _write_model(job: Job) -> Outcome:
    model = read_model(job)
    width = model.text_config["hidden_size"]
    if job.target_layout in ("llava_ds", "transformers"):
        choose_projector_export(model.projector, model.tower.width, width, model.projector_act)
    is_compared = job.options.compares_logits and job.target_layout != "gguf"
    dtype = parity.choose_dtype(model) if is_compared else None
    records = _MODEL_WRITERS[job.target_layout](model, job)
    if dtype is None:
        reason = "--no-logits" if job.target_layout != "gguf" else "nothing here computes from GGUF files"
        job.notes.append(f"logits were not compared: {reason}")
        return records, []
    return records, _compare_model(model, job, dtype)


def _write_transformers(model: StoredModel, job: Job) -> dict[str, FileRecord]:
    if model.zero_features:
        job.notes.append("the model was trained blind (model.zero_features); transformers will show it the pictures")
    if projector_export(model) == "identity":
        job.notes.append("projector_hidden_act is linear, which transformers reads, but not vLLM, SGLang or llama.cpp")
    stop = stop_string(model.tokenizer, resolve_template(model.template, model.tokenizer))
    if stop:
        job.notes.append(f"answers end with the text {stop!r}, no token: give stop_strings=[{stop!r}] to generate")
    return write_and_check(model, job.work, job.options.max_shard_bytes or MAX_SHARD_BYTES, job.phases)


def _write_original(model: StoredModel, job: Job) -> dict[str, FileRecord]:
    check_writable(model)
    # The tower is written twice where its name does not say where to get it.
    again = [] if model.tower_name else [*strip_prefix(model.weights, TOWER).values()]
    num_bytes = sum(value.numel for value in (*model.weights.values(), *again)) * model.dtype.itemsize
    check_room(job.work, num_bytes)
    records, notes = write_original(
        model, job.work, job.options.max_shard_bytes or MAX_SHARD_BYTES, job.phases("writing", num_bytes), job.out
    )
    job.notes.extend(notes)
    return records


def _write_gguf(model: StoredModel, job: Job) -> dict[str, FileRecord]:
    num_bytes = sum(value.numel for value in model.weights.values()) * model.dtype.itemsize
    check_room(job.work, num_bytes)
    write_gguf(model, job.work, job.phases("writing", num_bytes), class_token=job.options.class_token or "last")
    job.notes.append("every tensor, read through the package gguf, equals its source; llama.cpp itself was not run")
    return {}


_MODEL_WRITERS: dict[str, Callable[[StoredModel, Job], dict[str, FileRecord]]] = {
    "llava_ds": _write_transformers, "transformers": _write_transformers, "llava": _write_original,
    "gguf": _write_gguf,
}


def _compare_model(model: StoredModel, job: Job, dtype: torch.dtype) -> list[Comparison]:
    logits = parity.stored_logits(model, dtype)
    comparisons = []
    if job.target_layout in ("llava_ds", "transformers"):
        theirs = parity.transformers_logits(model, job.work, dtype)
        comparisons.append(parity.compare("transformers", "logits", logits, theirs, dtype))
    if job.target_layout == "llava_ds":
        ours = parity.stored_logits(read_transformers(job.work, committed=False), dtype)
        comparisons.append(parity.compare("llava_ds", "logits", logits, ours, dtype))
    if job.target_layout == "llava":
        ours = parity.stored_logits(read_original(job.work), dtype)
        comparisons.append(parity.compare("llava_ds", "logits", logits, ours, dtype))
        job.notes.append("read back by llava_ds; the original code itself was not run")
    return comparisons


def _write_projector(job: Job) -> Outcome:
    file = job.work / PROJECTOR_FILE
    weights, dtype, config = (read_projector if job.source_layout == "projector" else _projector_of_model)(job)
    projector_file.write_projector(weights, file, dtype)
    if config:
        write_json(job.work / "config.json", config)
    return {}, [parity.compare_tensors("llava_ds", weights, projector_file.read_projector_file(file), dtype)]


def _projector_of_model(job: Job) -> tuple[Weights, torch.dtype, dict[str, Any]]:
    """A model's projector, its precision, and the config that the original code wants beside it."""
    model = read_model(job, parts_only=True)
    weights = strip_prefix(model.weights, PROJECTOR)
    try:
        check_writable(model)
    except ConfigError as error:
        job.notes.append(f"there is no config.json beside it: {error}")
        return weights, model.dtype, {}
    if model.tower_name is None:
        job.notes.append(
            "its config.json names no mm_vision_tower, which the original code asks for: set it to a folder with the "
            "tower (--to clip writes one)"
        )
    num_rows, _ = own_vocabulary(model)
    return weights, model.dtype, original_config(model, num_rows, model.tower_name)


def _write_tower(job: Job) -> Outcome:
    tower, dtype, select_layer = read_tower(job)
    rounded = replace(tower, weights={name: value.cast(dtype) for name, value in tower.weights.items()})
    source = parity.tower_features(rounded, select_layer, torch.float32)
    progress = job.phases("writing", sum(value.num_bytes for value in rounded.weights.values()))
    if job.target_layout == "clip":
        records = clip.write_clip(tower, job.work, dtype, progress)
        export, reader = parity.clip_features(tower, job.work, select_layer, torch.float32), "transformers"
    else:
        records = clip.write_tower_folder(tower, job.work, dtype, progress)
        written = clip.read_tower_folder(job.work)
        export, reader = parity.tower_features(written, select_layer, torch.float32), "llava_ds"
    return records, [parity.compare(reader, "features", source, export, torch.float32)]


_WRITERS: dict[str, Callable[[Job], Outcome]] = {
    **dict.fromkeys(_MODEL_WRITERS, _write_model), "projector": _write_projector, "clip": _write_tower,
    "tower": _write_tower,
}
