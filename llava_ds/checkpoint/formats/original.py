"""A folder of the original LLaVA code, read: the LLM's, with projector and tower among its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.formats.clip import (
    StoredTower,
    check_tower_weights,
    read_clip,
    read_clip_spec,
    relative_layer,
    spec_of_openai,
)
from llava_ds.checkpoint.formats.llm import check_llm_weights, without_derived
from llava_ds.checkpoint.formats.original_config import OWN_KEY, read_original_config, text_config_of
from llava_ds.checkpoint.formats.projector_file import check_projector, kind_of_projector, projector_widths
from llava_ds.checkpoint.keymap import (
    LLM,
    PROJECTOR,
    TOWER,
    Weights,
    add_prefix,
    list_some,
    strip_prefix,
    tower_from_clip,
)
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.stored_model import StoredModel, find_tokenizer_model
from llava_ds.checkpoint.tensor_files import find_weight_files, open_tensors
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.build import load_tokenizer
from llava_ds.models.vision_tower import TowerSpec

PROJECTOR_PREFIX = "model.mm_projector."
ANY_TOWER_PREFIX = "model.vision_tower."
TOWER_PREFIX = f"{ANY_TOWER_PREFIX}vision_tower.vision_model."
TOWER_FOLDER = "vision_tower"


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
    config = read_original_config(folder)
    own = config.get(OWN_KEY, {})
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
        tower_name=None if given else published, tokenizer_model=find_tokenizer_model(folder),
    )


def read_original_weights(folder: Path) -> Weights:
    """LLM and projector of a folder of the original code, by our names: what a run may start from.

    Raises CheckpointError as ``read_original`` does.
    """
    return _llm_and_projector(folder, read_original_config(folder), open_tensors(find_weight_files(folder)))


def _llm_and_projector(folder: Path, config: Mapping[str, Any], everything: Mapping[str, LazyTensor]) -> Weights:
    text_config = text_config_of(config)
    projector = strip_prefix(everything, PROJECTOR_PREFIX)
    kind = config.get("mm_projector_type") or "linear"
    if kind_of_projector(projector) != kind:
        found = list_some(sorted(projector)) or "no weights"
        raise CheckpointError(f"{folder}: mm_projector_type is {kind}, but its projector has {found}")
    check_projector(projector, str(folder))
    others = (PROJECTOR_PREFIX, ANY_TOWER_PREFIX)
    llm = {name: value for name, value in everything.items() if not name.startswith(others)}
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
    clip = strip_prefix(everything, TOWER_PREFIX)
    if not clip:
        left = [key for key in everything if key.startswith(ANY_TOWER_PREFIX)]
        if left:
            raise CheckpointError(
                f"{folder}: the tower's weights have other names than {TOWER_PREFIX}*: {list_some(left)}"
            )
        return read_clip(places[0]) if places else None
    if OWN_KEY in config:
        spec = TowerSpec.from_dict(config[OWN_KEY]["tower"])
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
