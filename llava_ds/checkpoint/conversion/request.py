"""What a user asks of a conversion: which layouts go into which, and which options are of use between them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from llava_ds.checkpoint.new_folder import Phases
from llava_ds.errors import ConfigError

SOURCES = ("llava_ds", "transformers", "llava", "projector", "clip", "tower")
TARGETS = ("llava_ds", "transformers", "llava", "gguf", "projector", "clip", "tower")
_MODELS = ("llava_ds", "transformers", "llava")
_PARTS = ("projector", "clip", "tower")
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


@dataclass(frozen=True)
class Job:
    """A conversion under way: what is asked for, ``work`` (which becomes ``out``), and what a user should know."""

    source: Path
    source_layout: str
    target_layout: str
    options: Options
    out: Path
    work: Path
    phases: Phases
    notes: list[str] = field(default_factory=list)


def check_request(source: str, target: str, options: Options) -> None:
    """Raises ConfigError when the layouts do not go together, or an option is missing or of no use between them."""
    if target not in POSSIBLE.get(source, ()):
        pairs = "\n  ".join(f"{start}: to {', '.join(ends)}" for start, ends in POSSIBLE.items())
        raise ConfigError(f"from {source} to {target} is no conversion. Possible are, from\n  {pairs}")
    useful = _useful_options(source, target)
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


def _useful_options(source: str, target: str) -> set[str]:
    useful = {*_ALWAYS, *_OF_TARGET[target]}
    if target not in _PARTS or source == "tower":
        return useful | {*_OF_SOURCE[source]}
    if source == "llava" and target != "projector":
        return useful | {"vision_tower", "vision_pretrained"}
    return useful


def _flag(name: str) -> str:
    special = {"max_shard_bytes": "--max-shard-size", "compares_logits": "--no-logits"}
    return special.get(name, "--" + name.replace("_", "-"))
