"""From any layout of a LLaVA, or of one of its parts, to any other that the same parts make.

A source is read into a ``StoredModel``, a projector or a tower, whichever the target needs; a target is written from
it, read back, compared with it, and appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint import parity
from llava_ds.checkpoint.formats import clip, original, projector_file
from llava_ds.checkpoint.formats.llm import read_llm
from llava_ds.checkpoint.formats.transformers import projector_export, read_transformers
from llava_ds.checkpoint.keymap import LLM, PROJECTOR, TOWER, Weights, add_prefix, choose_projector_export, strip_prefix
from llava_ds.checkpoint.layout import FileRecord, commit, read_run, reading, resolve_step
from llava_ds.checkpoint.merge import (
    MAX_SHARD_BYTES,
    Phases,
    check_step,
    new_folder,
    no_phases,
    refuse_existing,
    write_and_check,
)
from llava_ds.checkpoint.parity import Comparison
from llava_ds.checkpoint.recognise import MERGED_FILE, PROJECTOR_FILE, find_projector_file, recognise_layout
from llava_ds.checkpoint.runs import PARTS, open_run
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.checkpoint.writer import read_back
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.vision_tower import TOWER_CONFIG_FILE

_SPARE_BYTES = 64 << 20  # tokenizer and configs
SOURCES = ("llava_ds", "transformers", "llava", "projector", "clip", "tower")
TARGETS = ("llava_ds", "transformers", "llava", "gguf", "projector", "clip", "tower")
_MODELS = ("llava_ds", "transformers", "llava")
POSSIBLE = {
    **dict.fromkeys(_MODELS, TARGETS),
    "projector": ("llava_ds", "transformers", "llava", "gguf", "projector"),
    **dict.fromkeys(("clip", "tower"), ("clip", "tower")),
}
"""Which targets a source makes; a projector makes a model with an LLM and a tower (``--llm``, ``--vision-tower``)."""


@dataclass(frozen=True)
class Options:
    """What a source lacks or is to be replaced; None leaves it as it is."""

    llm: Path | None = None
    vision_tower: str | None = None
    vision_pretrained: str | None = None
    select_layer: int | None = None
    template: str | None = None
    image_aspect_ratio: str | None = None
    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None
    projector_act: str | None = None
    """relu, gelu or linear: how a linear projector is written in two layers."""
    class_token: str | None = None
    """first or last: where the llama.cpp that a GGUF is for puts it (see formats/gguf.py)."""
    compares_logits: bool = True


@dataclass
class Conversion:
    """What was written: file names, what was compared, and what a user should know."""

    source_layout: str
    target_layout: str
    files: list[str]
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)


# Where an option is of use: by source for a whole model, and by target.
_OF_SOURCE = {
    "llava_ds": (), "transformers": ("template",),
    "llava": ("template", "vision_tower", "vision_pretrained", "select_layer", "image_aspect_ratio"),
    "projector": ("llm", "template", "vision_tower", "vision_pretrained", "select_layer", "image_aspect_ratio"),
    "clip": (), "tower": ("vision_pretrained",),
}
_OF_TARGET = {
    "llava_ds": ("max_shard_bytes", "projector_act"), "transformers": ("max_shard_bytes", "projector_act"),
    "llava": ("max_shard_bytes",), "gguf": ("class_token",), "projector": (), "clip": ("select_layer",),
    "tower": ("select_layer",),
}
_ALWAYS = ("dtype", "compares_logits")
_PARTS = ("projector", "clip", "tower")


def convert(
    source: Path, out: Path, target_layout: str, source_layout: str = "auto", options: Options | None = None,
    phases: Phases = no_phases,
) -> Conversion:
    """Converts ``source`` into the new folder ``out``, which appears whole or not at all.

    Raises:
        ConfigError: the layouts do not go together, or an option is missing, of no use here or does not fit.
        CheckpointError: the source is incomplete, ``out`` exists or cannot be written, or what was written does not
            compute what the source does.
    """
    options = options or Options()
    if source_layout == "auto":
        source_layout = detect_layout(source)
    _check_request(source_layout, target_layout, options)
    refuse_existing(out)
    with new_folder(out) as work:
        job = _Job(source, source_layout, target_layout, options, out, work, phases)
        records, comparisons = _WRITERS[target_layout](job)
        parity.refuse_failures(comparisons, out)
        _write_json(work / parity.PARITY_FILE, {
            "from": source_layout, "to": target_layout, "comparisons": [item.as_dict() for item in comparisons],
            "notes": job.notes,
        })
        commit(work, records)
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return Conversion(source_layout, target_layout, files, comparisons, job.notes)


def detect_layout(path: Path) -> str:
    """The source layout of what lies at ``path``. Raises CheckpointError when it is none of them."""
    if (path / TOWER_CONFIG_FILE).is_file():
        return "tower"
    if (path / "config.json").is_file():
        with reading(path / "config.json") as file:
            if json.loads(file.read_text()).get("model_type") in ("clip", "clip_vision_model"):
                return "clip"
    if (path / MERGED_FILE).is_file():
        return "llava_ds"
    layout = recognise_layout(path)
    return {"original": "llava"}.get(layout, layout)


def _check_request(source: str, target: str, options: Options) -> None:
    if target not in POSSIBLE.get(source, ()):
        pairs = "\n  ".join(f"{start}: to {', '.join(ends)}" for start, ends in POSSIBLE.items())
        raise ConfigError(f"from {source} to {target} is no conversion. Possible are, from\n  {pairs}")
    useful = {*_ALWAYS, *_OF_TARGET[target]}
    if target not in _PARTS or source == "tower":
        useful |= {*_OF_SOURCE[source]}
    elif source == "llava" and target != "projector":
        useful |= {"vision_tower", "vision_pretrained"}
    default = Options()
    given = [item.name for item in fields(Options) if getattr(options, item.name) != getattr(default, item.name)]
    useless = [_flag(name) for name in given if name not in useful]
    if useless:
        raise ConfigError(
            f"{', '.join(useless)} says nothing about a conversion from {source} to {target}; leave it out "
            f"(of use are {', '.join(sorted(_flag(name) for name in useful))})"
        )
    if source == "projector" and target not in _PARTS:
        lacking = [_flag(name) for name in ("llm", "vision_tower", "template") if getattr(options, name) is None]
        if lacking:
            raise ConfigError(f"a projector is a part of a model only; to make {target} give {', '.join(lacking)}, too")
    if options.vision_pretrained and not options.vision_tower and source != "tower":
        raise ConfigError(f"--vision-pretrained={options.vision_pretrained} needs --vision-tower, of which they are")


def _flag(name: str) -> str:
    special = {"max_shard_bytes": "--max-shard-size", "compares_logits": "--no-logits"}
    return special.get(name, "--" + name.replace("_", "-"))


@dataclass(frozen=True)
class _Job:
    source: Path
    source_layout: str
    target_layout: str
    options: Options
    out: Path
    work: Path
    phases: Phases
    notes: list[str] = field(default_factory=list)


_Outcome = tuple[dict[str, FileRecord], list[Comparison]]


def _read_model(job: _Job, parts_only: bool = False) -> StoredModel:
    """The whole model of a source; ``parts_only`` where nobody will read its template."""
    options = job.options
    model = _MODEL_READERS[job.source_layout](job, options.template or ("plain" if parts_only else None))
    return replace(model, dtype=options.dtype or model.dtype, projector_act=options.projector_act or "auto")


def _read_own(job: _Job, template: str | None) -> StoredModel:
    if (job.source / MERGED_FILE).is_file():
        return read_transformers(job.source, log=job.notes.append)
    step = resolve_step(job.source)
    check_step(step, job.phases)
    config = read_run(step)["config"]["model"]
    name = clip.published_name(config["vision_tower"], config["vision_pretrained"])
    parts = {"projector": ("projector",), "clip": ("vision_tower",), "tower": ("vision_tower",)}
    run = open_run(step, parts.get(job.target_layout, PARTS), fresh=True, log=job.notes.append)
    return replace(run, tower_name=name)


def _read_transformers(job: _Job, template: str | None) -> StoredModel:
    return read_transformers(job.source, template, job.notes.append)


def _read_original(job: _Job, template: str | None) -> StoredModel:
    options, tower = job.options, _given_tower(job.options)
    model = original.read_original(job.source, template, tower, options.select_layer, options.image_aspect_ratio)
    name = clip.published_name(options.vision_tower or "", options.vision_pretrained)
    return replace(model, tower_name=name) if tower else model


def _given_tower(options: Options) -> clip.StoredTower | None:
    return clip.read_tower(options.vision_tower, options.vision_pretrained) if options.vision_tower else None


def _model_around_projector(job: _Job, template: str | None) -> StoredModel:
    """A projector's file, with the LLM and the tower that the options name, as a whole model."""
    options, file = job.options, find_projector_file(job.source)
    projector = projector_file.read_projector_file(file)
    said = _beside(file)
    tower, llm = _given_tower(options), read_llm(Path(options.llm or ""))
    if tower is None:
        raise ConfigError("a projector needs --vision-tower to become a model")
    ends, widths = projector_file.projector_widths(projector), (tower.spec.width, llm.text_config["hidden_size"])
    if ends != widths:
        raise ConfigError(
            f"{file} goes from {ends[0]} to {ends[1]}, but the tower is {widths[0]} and the LLM {widths[1]} wide; give "
            "those that it was trained with"
        )
    weights = add_prefix(tower.weights, TOWER) | add_prefix(projector, PROJECTOR) | add_prefix(llm.weights, LLM)
    return StoredModel(
        weights=weights, text_config=llm.text_config, tower=tower.spec,
        select_layer=original.relative_layer(
            said.get("mm_vision_select_layer", -2) if options.select_layer is None else options.select_layer, tower.spec
        ),
        projector=str(projector_file.kind_of_projector(projector)), tokenizer=llm.tokenizer,
        template=str(template),
        image_aspect_ratio=options.image_aspect_ratio or said.get("image_aspect_ratio") or "square",
        zero_features=False, dtype=next(iter(llm.weights.values())).dtype,
        tower_name=clip.published_name(options.vision_tower or "", options.vision_pretrained),
    )


_MODEL_READERS: dict[str, Callable[[_Job, str | None], StoredModel]] = {
    "llava_ds": _read_own, "transformers": _read_transformers, "llava": _read_original,
    "projector": _model_around_projector,
}


def _beside(file: Path) -> dict[str, Any]:
    """The original code's config beside a projector's file, where there is one."""
    config = file.parent / "config.json"
    if not config.is_file():
        return {}
    with reading(config):
        return dict(json.loads(config.read_text()))


def _write_model(job: _Job) -> _Outcome:
    model = _read_model(job)
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


def _write_transformers(model: StoredModel, job: _Job) -> dict[str, FileRecord]:
    if model.zero_features:
        job.notes.append("the model was trained blind (model.zero_features); transformers will show it the pictures")
    if projector_export(model) == "identity":
        job.notes.append("projector_hidden_act is linear, which transformers reads, but not vLLM, SGLang or llama.cpp")
    return write_and_check(model, job.work, job.options.max_shard_bytes or MAX_SHARD_BYTES, job.phases)


def _write_original(model: StoredModel, job: _Job) -> dict[str, FileRecord]:
    original.check_writable(model)
    # The tower is written twice where its name does not say where to get it.
    again = [] if model.tower_name else [*strip_prefix(model.weights, TOWER).values()]
    num_bytes = sum(value.numel for value in (*model.weights.values(), *again)) * model.dtype.itemsize
    free = shutil.disk_usage(job.work).free
    if free < num_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{job.out.parent} has {free} bytes free, {num_bytes + _SPARE_BYTES} are needed.\n"
            "  Make room, or choose another folder."
        )
    records, notes = original.write_original(
        model, job.work, job.options.max_shard_bytes or MAX_SHARD_BYTES, job.phases("writing", num_bytes), job.out,
        _tokenizer_model(job),
    )
    job.notes.extend(notes)
    _check_written(job, records)
    return records


def _check_written(job: _Job, records: dict[str, FileRecord]) -> None:
    read_back(job.work, records, job.phases("reading back", sum(record.size for record in records.values())))


def _tokenizer_model(job: _Job) -> Path | None:
    """The SentencePiece file of the LLM's tokenizer, where the source has or names one."""
    if job.source_layout == "projector":
        folder = Path(job.options.llm or "")
    elif job.source_layout == "llava_ds" and not (job.source / MERGED_FILE).is_file():
        folder = Path(read_run(resolve_step(job.source))["sources"]["llm"]["folder"])
    else:
        folder = job.source
    return folder / "tokenizer.model" if (folder / "tokenizer.model").is_file() else None


def _write_gguf(model: StoredModel, job: _Job) -> dict[str, FileRecord]:
    from llava_ds.checkpoint.formats.gguf import write_gguf

    num_bytes = sum(value.numel for value in model.weights.values()) * model.dtype.itemsize
    write_gguf(model, job.work, job.phases("writing", num_bytes), class_token=job.options.class_token or "last")
    return {}


_MODEL_WRITERS: dict[str, Callable[[StoredModel, _Job], dict[str, FileRecord]]] = {
    "llava_ds": _write_transformers, "transformers": _write_transformers, "llava": _write_original,
    "gguf": _write_gguf,
}


def _compare_model(model: StoredModel, job: _Job, dtype: torch.dtype) -> list[Comparison]:
    logits = parity.stored_logits(model, dtype)
    comparisons = []
    if job.target_layout in ("llava_ds", "transformers"):
        theirs = parity.transformers_logits(model, job.work, dtype)
        comparisons.append(parity.compare("transformers", "logits", logits, theirs, dtype))
    if job.target_layout == "llava_ds":
        ours = parity.stored_logits(read_transformers(job.work, committed=False), dtype)
        comparisons.append(parity.compare("llava_ds", "logits", logits, ours, dtype))
    if job.target_layout == "llava":
        ours = parity.stored_logits(original.read_original(job.work), dtype)
        comparisons.append(parity.compare("llava_ds", "logits", logits, ours, dtype))
        job.notes.append("read back by llava_ds; the original code itself was not run")
    return comparisons


def _write_projector(job: _Job) -> _Outcome:
    file = job.work / PROJECTOR_FILE
    weights, dtype, config = (_projector_alone if job.source_layout == "projector" else _projector_of_model)(job)
    projector_file.write_projector(weights, file, dtype)
    if config:
        _write_json(job.work / "config.json", config)
    return {}, [parity.compare_tensors("llava_ds", weights, projector_file.read_projector_file(file), dtype)]


def _projector_alone(job: _Job) -> tuple[Weights, torch.dtype, dict[str, Any]]:
    given = find_projector_file(job.source)
    weights = projector_file.read_projector_file(given)
    if projector_file.holds_words(given):
        job.notes.append("word embeddings beside the projector are left out; they belong to the LLM")
    return weights, job.options.dtype or next(iter(weights.values())).dtype, _beside(given)


def _projector_of_model(job: _Job) -> tuple[Weights, torch.dtype, dict[str, Any]]:
    """A model's projector, its precision, and the config that the original code wants beside it."""
    model = _read_model(job, parts_only=True)
    weights = strip_prefix(model.weights, PROJECTOR)
    try:
        original.check_writable(model)
    except ConfigError as error:
        job.notes.append(f"there is no config.json beside it: {error}")
        return weights, model.dtype, {}
    if model.tower_name is None:
        job.notes.append("its config.json names no mm_vision_tower; the original code asks for one")
    num_rows, _ = original.own_vocabulary(model)
    return weights, model.dtype, original.original_config(model, num_rows, model.tower_name)


def _write_tower(job: _Job) -> _Outcome:
    tower, dtype, select_layer = _tower_of_source(job)
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
    _check_written(job, records)
    return records, [parity.compare(reader, "features", source, export, torch.float32)]


def _tower_of_source(job: _Job) -> tuple[clip.StoredTower, torch.dtype, int]:
    """The tower, its precision and the layer whose features are compared."""
    asked = job.options.select_layer
    if job.source_layout in _TOWER_READERS:
        tower = _TOWER_READERS[job.source_layout](job)
        dtype = job.options.dtype or next(iter(tower.weights.values())).dtype
        return tower, dtype, -2 if asked is None else asked
    model = _read_model(job, parts_only=True)
    return clip.tower_of(model), model.dtype, model.select_layer if asked is None else asked


_TOWER_READERS: dict[str, Callable[[_Job], clip.StoredTower]] = {
    "clip": lambda job: clip.read_clip(job.source),
    "tower": lambda job: clip.read_tower(str(job.source), job.options.vision_pretrained),
}
_WRITERS: dict[str, Callable[[_Job], _Outcome]] = {
    **dict.fromkeys(("llava_ds", "transformers", "llava", "gguf"), _write_model),
    "projector": _write_projector, "clip": _write_tower, "tower": _write_tower,
}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
