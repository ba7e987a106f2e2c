"""A LLaVA of transformers, read: the folders that our export writes, and llava-hf's in any of their four layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from llava_ds.checkpoint import keymap
from llava_ds.checkpoint.formats.clip import read_image_processor, relative_layer, spec_from_clip
from llava_ds.checkpoint.formats.llm import check_llm_weights, without_derived
from llava_ds.checkpoint.json_file import read_json
from llava_ds.checkpoint.keymap import HF_LLM, HF_PROJECTOR, HF_TOWER, LLM, PROJECTOR, TOWER, add_prefix, strip_prefix
from llava_ds.checkpoint.layout import find_damage, read_manifest, reading
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.processor import PAD_TOKEN
from llava_ds.checkpoint.recognise import MERGED_FILE
from llava_ds.checkpoint.remarks import Log, say
from llava_ds.checkpoint.stored_model import StoredModel, find_tokenizer_model
from llava_ds.checkpoint.tensor_files import find_weight_files, open_tensors
from llava_ds.constants import COMPLETE_MARKER, IMAGE_PLACEHOLDER
from llava_ds.errors import CheckpointError
from llava_ds.models.build import describe_llm, load_tokenizer
from llava_ds.models.vision_tower import TowerSpec

USUAL_TEMPLATE = "v1"  # of LLaVA-1.5


def read_transformers(
    folder: Path, template: str | None = None, log: Log = say, committed: bool = True
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
    images = read_image_processor(folder)
    if facts:
        tower = TowerSpec.from_dict(facts["tower"])
    else:
        tower = spec_from_clip(config.vision_config.to_dict(), images, str(folder))
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
        select_layer=relative_layer(config.vision_feature_layer, tower),
        projector="mlp2x_gelu" if export == "mlp" else "linear",
        tokenizer=tokenizer,
        template=template or facts.get("template", USUAL_TEMPLATE),
        image_aspect_ratio=facts.get("image_aspect_ratio") or ("pad" if images.get("do_pad") else "square"),
        zero_features=facts.get("zero_features", False),
        dtype=_dtype(config, llm),
        tokenizer_model=find_tokenizer_model(folder),
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


def _read_facts(folder: Path, committed: bool) -> dict[str, Any]:
    """What our own export says beside the weights; nothing where another wrote the folder."""
    if not (folder / MERGED_FILE).is_file():
        return {}
    if committed:
        if not (folder / COMPLETE_MARKER).is_file():
            raise CheckpointError(f"{folder} is not complete (no {COMPLETE_MARKER}); merge or convert again")
        # The other files may be edited by whoever serves the model.
        names = [n for n in read_manifest(folder) if n.endswith(".safetensors") or n in ("config.json", MERGED_FILE)]
        problems = find_damage(folder, names, hashes=False)
        if problems:
            lines = "\n  ".join(problems)
            raise CheckpointError(f"{folder} is damaged:\n  {lines}\n  Copy it, or merge or convert again.")
    return read_json(folder / MERGED_FILE)


def _read_config(folder: Path) -> Any:
    raw = read_json(folder / "config.json")
    kind, strategy = raw.get("model_type"), raw.get("vision_feature_select_strategy", "default")
    with reading(folder / "config.json"):
        config = LlavaConfig.from_pretrained(folder)
    vision = config.vision_config
    wanted = {
        "model_type": (kind, "llava"),
        "vision_config.model_type": (vision.model_type, "clip_vision_model"),
        "vision_feature_select_strategy": (strategy, "default"),
    }
    problems = [f"{key} is {found!r}, {known!r} is needed" for key, (found, known) in wanted.items() if found != known]
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


def _dtype(config: Any, llm: Mapping[str, LazyTensor]) -> torch.dtype:
    """The precision of the folder: what config.json says, else the LLM's own."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next(value.dtype for value in llm.values() if value.dtype.is_floating_point)
