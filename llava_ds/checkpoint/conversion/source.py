"""The side that a conversion reads: a whole model, or the part of it that the target is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.conversion.request import Job, Options
from llava_ds.checkpoint.formats import clip, original, projector_file
from llava_ds.checkpoint.formats.llm import read_llm
from llava_ds.checkpoint.formats.transformers import read_transformers
from llava_ds.checkpoint.json_file import read_json
from llava_ds.checkpoint.keymap import LLM, PROJECTOR, TOWER, Weights, add_prefix
from llava_ds.checkpoint.layout import read_run, resolve_step
from llava_ds.checkpoint.merge import check_step
from llava_ds.checkpoint.recognise import MERGED_FILE, find_projector_file
from llava_ds.checkpoint.runs import PARTS, open_run
from llava_ds.checkpoint.stored_model import StoredModel, find_tokenizer_model
from llava_ds.errors import ConfigError


def read_model(job: Job, parts_only: bool = False) -> StoredModel:
    """The whole model of a source; ``parts_only`` where nobody will read its template.

    Raises ConfigError or CheckpointError as the readers of its layout do.
    """
    options = job.options
    model = _MODEL_READERS[job.source_layout](job, options.template or ("plain" if parts_only else None))
    return replace(model, dtype=options.dtype or model.dtype, projector_act=options.projector_act or "auto")


def _read_own(job: Job, template: str | None) -> StoredModel:
    if (job.source / MERGED_FILE).is_file():
        return read_transformers(job.source, log=job.notes.append)
    step = resolve_step(job.source)
    check_step(step, job.phases)
    config = read_run(step)["config"]["model"]
    name = clip.published_name(config["vision_tower"], config["vision_pretrained"])
    parts = {"projector": ("projector",), "clip": ("vision_tower",), "tower": ("vision_tower",)}
    run = open_run(step, parts.get(job.target_layout, PARTS), fresh=True, log=job.notes.append)
    return replace(run, tower_name=name)


def _read_transformers(job: Job, template: str | None) -> StoredModel:
    return read_transformers(job.source, template, job.notes.append)


def _read_original(job: Job, template: str | None) -> StoredModel:
    options, tower = job.options, _given_tower(job.options)
    model = original.read_original(job.source, template, tower, options.select_layer, options.image_aspect_ratio)
    name = clip.published_name(options.vision_tower or "", options.vision_pretrained)
    return replace(model, tower_name=name) if tower else model


def _given_tower(options: Options) -> clip.StoredTower | None:
    return clip.read_tower(options.vision_tower, options.vision_pretrained) if options.vision_tower else None


def _model_around_projector(job: Job, template: str | None) -> StoredModel:
    """A projector's file, with the LLM and the tower that the options name, as a whole model."""
    options, file = job.options, find_projector_file(job.source)
    projector = projector_file.read_projector_file(file)
    said, llm_folder = _beside(file), Path(options.llm or "")
    tower, llm = _given_tower(options), read_llm(llm_folder)
    if tower is None:
        raise ConfigError("a projector needs --vision-tower to become a model")
    ends, widths = projector_file.projector_widths(projector), (tower.spec.width, llm.text_config["hidden_size"])
    if ends != widths:
        raise ConfigError(
            f"{file} goes from {ends[0]} to {ends[1]}, but the tower is {widths[0]} and the LLM {widths[1]} wide; give "
            "those that it was trained with"
        )
    weights = add_prefix(tower.weights, TOWER) | add_prefix(projector, PROJECTOR) | add_prefix(llm.weights, LLM)
    layer = said.get("mm_vision_select_layer", -2) if options.select_layer is None else options.select_layer
    return StoredModel(
        weights=weights, text_config=llm.text_config, tower=tower.spec,
        select_layer=clip.relative_layer(layer, tower.spec),
        projector=str(projector_file.kind_of_projector(projector)), tokenizer=llm.tokenizer,
        template=str(template),
        image_aspect_ratio=options.image_aspect_ratio or said.get("image_aspect_ratio") or "square",
        zero_features=False, dtype=next(iter(llm.weights.values())).dtype,
        tower_name=clip.published_name(options.vision_tower or "", options.vision_pretrained),
        tokenizer_model=find_tokenizer_model(llm_folder),
    )


_MODEL_READERS: dict[str, Callable[[Job, str | None], StoredModel]] = {
    "llava_ds": _read_own, "transformers": _read_transformers, "llava": _read_original,
    "projector": _model_around_projector,
}


def read_projector(job: Job) -> tuple[Weights, torch.dtype, dict[str, Any]]:
    """A projector's file, its precision, and the original code's config beside it, where there is one."""
    given = find_projector_file(job.source)
    weights = projector_file.read_projector_file(given)
    if projector_file.holds_words(given):
        job.notes.append("word embeddings beside the projector are left out; they belong to the LLM")
    return weights, job.options.dtype or next(iter(weights.values())).dtype, _beside(given)


def _beside(file: Path) -> dict[str, Any]:
    config = file.parent / "config.json"
    return read_json(config) if config.is_file() else {}


def read_tower(job: Job) -> tuple[clip.StoredTower, torch.dtype, int]:
    """The tower of a source, its precision, and the layer whose features are compared."""
    asked = job.options.select_layer
    if job.source_layout in ("clip", "tower"):
        if job.source_layout == "clip":
            tower = clip.read_clip(job.source)
        else:
            tower = clip.read_tower(str(job.source), job.options.vision_pretrained)
        dtype = job.options.dtype or next(iter(tower.weights.values())).dtype
        return tower, dtype, clip.relative_layer(-2 if asked is None else asked, tower.spec)
    model = read_model(job, parts_only=True)
    layer = model.select_layer if asked is None else asked
    return clip.tower_of(model), model.dtype, clip.relative_layer(layer, model.tower)
