"""The LLM's part of a stored model: read from a transformers folder, and checked against its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.keymap import Weights
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.tensor_files import find_weight_files, open_tensors
from llava_ds.errors import CheckpointError
from llava_ds.models.build import describe_llm, load_tokenizer, read_text_config

_BUFFERS = ("rotary_emb.inv_freq",)  # older files hold them; they follow from the config


@dataclass(frozen=True)
class StoredLlm:
    """A causal LM without its weights in memory; they have transformers' names (ours below ``llm.``)."""

    text_config: dict[str, Any]
    weights: Mapping[str, LazyTensor]
    tokenizer: Any


def read_llm(folder: Path) -> StoredLlm:
    """A transformers causal LM of a folder.

    Raises ConfigError when there is none; CheckpointError when its weights do not fit its config.
    """
    text_config = read_text_config(folder)
    weights = without_derived(open_tensors(find_weight_files(folder)), bool(text_config.get("tie_word_embeddings")))
    check_llm_weights(text_config, weights, str(folder))
    return StoredLlm(text_config, weights, load_tokenizer(str(folder)))


def without_derived(weights: Mapping[str, LazyTensor], tied: bool) -> Weights:
    """A causal LM's weights without buffers, and without the head where it is the word embedding."""
    return {name: value for name, value in weights.items()
            if not name.endswith(_BUFFERS) and not (tied and name == "lm_head.weight")}


def check_llm_weights(text_config: dict[str, Any], weights: Mapping[str, LazyTensor], where: str) -> None:
    """Raises CheckpointError that lists every weight that is missing, unknown or of another shape than the config's."""
    expected = describe_llm(text_config).shapes
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is unknown" for name in weights.keys() - expected.keys()]
    problems += [f"{name} is {weights[name].shape}, the config says {shape}" for name, shape in expected.items()
                 if name in weights and weights[name].shape != shape]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"{where}: the LLM's weights do not fit its config:\n  " + "\n  ".join(sorted(problems)[:20]) + more
        )
