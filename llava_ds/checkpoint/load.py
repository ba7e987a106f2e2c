"""A whole model in memory, in one process, from a run or from any layout that is read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from llava_ds.checkpoint.formats.original import read_original
from llava_ds.checkpoint.formats.original_config import OWN_KEY
from llava_ds.checkpoint.formats.transformers import USUAL_TEMPLATE, read_transformers
from llava_ds.checkpoint.json_file import read_json
from llava_ds.checkpoint.keymap import LLM, strip_prefix
from llava_ds.checkpoint.layout import read_run, resolve_step
from llava_ds.checkpoint.lazy import PIECE_ELEMENTS
from llava_ds.checkpoint.recognise import MERGED_FILE, recognise_layout
from llava_ds.checkpoint.remarks import Log, say
from llava_ds.checkpoint.runs import open_run
from llava_ds.checkpoint.shard_size import MAX_SHARD_BYTES
from llava_ds.checkpoint.stored_model import StoredModel, copy_tokenizer_model
from llava_ds.checkpoint.writer import write_sharded
from llava_ds.constants import COMPLETE_MARKER
from llava_ds.errors import CheckpointError
from llava_ds.models.build import build_empty_llm
from llava_ds.models.llava import Llava
from llava_ds.models.projector import build_projector
from llava_ds.models.vision_tower import build_tower_from_spec


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is needed to talk to it."""

    model: Llava
    tokenizer: Any
    template: str
    image_aspect_ratio: str


def find_checkpoint(path: Path) -> Path:
    """The checkpoint step or the folder of another layout that ``path`` names; nothing is loaded.

    Raises CheckpointError when there is none, or it is not complete.
    """
    layout = recognise_layout(path)
    if layout == "llava_ds":
        return resolve_step(path)
    if layout == "projector":
        raise CheckpointError(f"{path} is a projector alone; start a run from it (model.init_from), then use the run")
    if (path / MERGED_FILE).is_file() and not (path / COMPLETE_MARKER).is_file():
        raise CheckpointError(f"{path} is not complete (no {COMPLETE_MARKER}); merge again")
    return path


def open_model(path: Path, template: str | None = None, log: Log = say) -> StoredModel:
    """The model at ``path``, whichever layout it is in, none of its weights in memory.

    ``template`` is for a folder that does not say how its model was trained.

    Raises CheckpointError when there is none, it is not complete, or something does not fit.
    """
    folder, layout = find_checkpoint(path), recognise_layout(path)
    if layout == "llava_ds":
        return open_run(folder, log=log)
    if layout == "transformers":
        return read_transformers(folder, template, log)
    says_template = "template" in read_json(folder / "config.json").get(OWN_KEY, {})
    if template is None and not says_template:
        log(f"{folder} does not say which template it was trained with: {USUAL_TEMPLATE} is taken, LLaVA-1.5's")
        template = USUAL_TEMPLATE
    return read_original(folder, template)


def load_model(path: Path, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model of a run folder, a checkpoint step, a merged folder, or of another's LLaVA.

    Raises CheckpointError when there is none, it is not complete, or something does not fit.
    """
    return assemble(open_model(path), attn_implementation, dtype)


def assemble(stored: StoredModel, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A stored model in memory, its weights copied piece by piece into their places.

    Raises CheckpointError that lists what is missing, unknown, or of another shape.
    """
    tower = build_tower_from_spec(stored.tower, stored.select_layer).to(dtype)
    llm = build_empty_llm(stored.text_config, attn_implementation, dtype)
    width = llm.config.get_text_config().hidden_size
    projector = build_projector(stored.projector, tower.spec.width, width, seed=0).to(dtype)
    model = Llava(tower, projector, llm, zero_features=stored.zero_features)
    _fill(model, stored)
    return LoadedModel(model.eval(), stored.tokenizer, stored.template, stored.image_aspect_ratio)


def _fill(model: Llava, stored: StoredModel) -> None:
    places = model.state_dict(keep_vars=True)
    filled = {id(places[name]) for name in stored.weights if name in places}
    problems = [f"{name}: is missing" for name, place in places.items() if id(place) not in filled]
    for name, tensor in stored.weights.items():
        if name not in places:
            problems.append(f"{name}: the model has no such weight")
        elif tuple(places[name].shape) != tensor.shape:
            problems.append(f"{name}: {tensor.shape} in {tensor.origin}, {tuple(places[name].shape)} in the model")
    if problems:
        raise CheckpointError("the weights do not fit the model:\n  " + "\n  ".join(problems[:20]))
    with torch.no_grad():
        for name, tensor in stored.weights.items():
            place = places[name].view(-1)
            for number, piece in enumerate(tensor.pieces()):
                start = number * PIECE_ELEMENTS
                place[start : start + len(piece)].copy_(piece)


def export_llm(run: Path, out: Path) -> None:
    """Writes the LLM of a run as a transformers folder with its tokenizer, in fp32.

    Raises CheckpointError when there is no complete checkpoint, or the folder cannot be written.
    """
    stored = open_run(run, parts=("llm",))
    out.mkdir(parents=True, exist_ok=True)
    weights = strip_prefix(stored.weights, LLM)
    config = AutoConfig.for_model(**stored.text_config | {"dtype": "float32"})
    config.save_pretrained(out)
    stored.tokenizer.save_pretrained(out)
    copy_tokenizer_model(stored, out)
    _generation_config(Path(read_run(resolve_step(run))["sources"]["llm"]["folder"]), config).save_pretrained(out)
    write_sharded(out, [(name, value.cast(torch.float32)) for name, value in weights.items()], MAX_SHARD_BYTES)


def _generation_config(folder: Path, config: Any) -> GenerationConfig:
    """The LLM's own settings, where they are valid: Vicuna's are not, and transformers would refuse to save them."""
    try:
        settings = GenerationConfig.from_pretrained(folder)
        settings.validate(strict=True)
    except (OSError, ValueError):
        return GenerationConfig(**{key: getattr(config, key, None) for key in _STOP_KEYS})
    return settings


_STOP_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
