"""A run as a whole model on disk: what it trained, what it started from, and its frozen parts from their sources."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.fragments import open_weights
from llava_ds.checkpoint.initial import fit_rows, reopen_initial
from llava_ds.checkpoint.keymap import LLM, PROJECTOR, TOWER, add_prefix, strip_prefix
from llava_ds.checkpoint.layout import find_damage, read_manifest, read_run, resolve_step
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.remarks import Log, say
from llava_ds.checkpoint.sources import check_sources
from llava_ds.checkpoint.stored_model import StoredModel, find_tokenizer_model
from llava_ds.checkpoint.tensor_files import open_tensors
from llava_ds.config import ModelConfig
from llava_ds.errors import CheckpointError
from llava_ds.models.build import (
    DTYPES,
    LlmLayout,
    build_llm,
    describe_llm,
    load_tokenizer,
    on_one_rank,
    read_text_config,
)
from llava_ds.models.projector import build_projector
from llava_ds.models.vision_tower import TowerSpec, build_tower, tower_shapes

Shapes = Mapping[str, tuple[int, ...]]
PARTS = ("vision_tower", "projector", "llm")


def open_run(path: Path, parts: Collection[str] = PARTS, fresh: bool = False, log: Log = say) -> StoredModel:
    """The model of a run (its last checkpoint) or of one checkpoint step, none of its weights in memory.

    ``parts`` are those whose weights are wanted. ``fresh`` reads frozen files again to compare their hashes, even where
    their times say that they have not changed. ``log`` is told where weights have to be loaded into memory after all.

    Raises CheckpointError when the checkpoint is not whole, a frozen file is gone or has changed, or tensors have no
    source: then all of them are named.
    """
    step = resolve_step(path)
    problems = find_damage(step, weight_shards(step), hashes=False)
    if problems:
        raise CheckpointError(damage_message(step, problems))
    record = read_run(step)
    config = ModelConfig.model_validate(record["config"]["model"])
    spec = TowerSpec.from_dict(record["tower"])
    llm_folder = Path(record["sources"]["llm"]["folder"])
    text_config = read_text_config(llm_folder)
    layout = describe_llm(text_config)
    expected = {name: shape for part in parts for name, shape in _shapes(part, config, spec, layout).items()}
    found = _collect(step, record, config, layout, expected, fresh, log)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{step}: {len(missing)} tensor(s) have no source; neither trained nor loaded, they would be random:\n  "
            f"{', '.join(missing)}\n  Train them, or start the run from weights that have them "
            "(model.init_from, model.llm_init=pretrained, model.vision_pretrained)."
        )
    settings = record["config"]
    return StoredModel(
        weights={name: found[name] for name in expected},
        text_config=text_config,
        tower=spec,
        select_layer=config.select_layer,
        projector=config.projector,
        tokenizer=load_tokenizer(str(llm_folder)),
        template=settings["data"]["template"],
        image_aspect_ratio=settings["data"]["image_aspect_ratio"],
        zero_features=config.zero_features,
        dtype=DTYPES[settings["train"]["precision"]],
        tokenizer_model=find_tokenizer_model(llm_folder),
    )


def weight_shards(step: Path) -> list[str]:
    """Files of a step that hold weights; the optimizer's are not read here."""
    return [name for name in read_manifest(step) if not name.startswith("optimizer-")]


def damage_message(step: Path, problems: Collection[str]) -> str:
    """What is said of a step whose files are not as they were written."""
    return f"{step} is damaged:\n  " + "\n  ".join(problems) + "\n  Copy it again, or use an earlier step of the run."


def _shapes(part: str, config: ModelConfig, spec: TowerSpec, llm: LlmLayout) -> dict[str, tuple[int, ...]]:
    if part == "vision_tower":
        return {f"{part}.{name}": shape for name, shape in tower_shapes(spec).items()}
    if part == "llm":
        return {LLM + name: shape for name, shape in llm.shapes.items()}
    with torch.device("meta"):
        projector = build_projector(config.projector, spec.width, _llm_width(llm), seed=0)
    return {PROJECTOR + name: tuple(value.shape) for name, value in projector.state_dict().items()}


def _llm_width(llm: LlmLayout) -> int:
    return next(llm.shapes[name][1] for name in llm.word_tables if len(llm.shapes[name]) == 2)


def _collect(
    step: Path, record: Mapping[str, Any], config: ModelConfig, layout: LlmLayout, expected: Shapes, fresh: bool,
    log: Log,
) -> dict[str, LazyTensor]:
    """The weights that are somewhere: trained ones first, then inherited ones, then those of frozen sources."""
    found = {name: tensor for name, tensor in open_weights(step).items() if name in expected}
    found |= reopen_initial(record["initial_weights"], step, expected.keys() - found.keys(), fresh)
    for name in layout.word_tables & strip_prefix(found, LLM).keys():
        found[LLM + name] = fit_rows(found[LLM + name], expected[LLM + name])
    absent = expected.keys() - found.keys()
    frozen = [part for part in ("vision_tower", "llm") if any(name.startswith(f"{part}.") for name in absent)]
    check_sources(record["sources"], frozen, fresh)
    for part in frozen:
        source = record["sources"][part]
        if source["files"] and part == "vision_tower":
            found = _open_tower(source, config, TowerSpec.from_dict(record["tower"]), log) | found
        elif source["files"]:
            found = _open_llm(source, config, layout, log) | found
    wrong = [
        f"{name}: {found[name].shape} in {found[name].origin}, {shape} expected"
        for name, shape in expected.items() if name in found and found[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{step}: weights do not fit the model of its run:\n  " + "\n  ".join(wrong))
    return found


def _open_tower(source: Mapping[str, Any], config: ModelConfig, spec: TowerSpec, log: Log) -> dict[str, LazyTensor]:
    """The tower's weights from its file where they stand in it as they are, else through open_clip, in memory."""
    weights_file = next(Path(file) for file in source["files"] if not file.endswith(".json"))
    pretrained = source["pretrained"]
    if pretrained is None:
        return add_prefix(open_tensors([weights_file]), TOWER)

    def load() -> Mapping[str, torch.Tensor]:
        log(f"the tower is read through open_clip, which holds it in memory: {source['source']}")
        return build_tower(config.vision_tower, pretrained, config.select_layer).visual.state_dict()

    shapes = {name.removeprefix("visual."): shape for name, shape in tower_shapes(spec).items()}
    return add_prefix(_deferred(shapes, load, str(weights_file)), TOWER)


def _open_llm(source: Mapping[str, Any], config: ModelConfig, layout: LlmLayout, log: Log) -> dict[str, LazyTensor]:
    """The LLM's weights from its files where they have the names and shapes that they have in memory."""
    files = [Path(file) for file in source["files"] if not file.endswith(".json")]
    opened = open_tensors(files)
    if all(name in opened and opened[name].shape == shape for name, shape in layout.shapes.items()):
        return {LLM + name: opened[name] for name in layout.shapes}

    def load() -> Mapping[str, torch.Tensor]:
        log(f"the LLM's files have other names than its weights in memory, so it is loaded whole: {source['folder']}")
        with on_one_rank():
            # In fp32: what is rounded to the run's precision in the end is what the files hold.
            llm = build_llm(config.model_copy(update={"llm": source["folder"]}), "eager", torch.float32, seed=0)
        return llm.state_dict()

    return add_prefix(_deferred(layout.shapes, load, source["folder"]), LLM)


def _deferred(shapes: Shapes, load: Callable[[], Mapping[str, torch.Tensor]], origin: str) -> dict[str, LazyTensor]:
    """fp32 tensors that are loaded, all together, when the first of them is read."""
    state = functools.cache(load)

    def one(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(torch.float32, shape, lambda start, stop: state()[name].flatten()[start:stop], origin)

    return {name: one(name, shape) for name, shape in shapes.items()}
