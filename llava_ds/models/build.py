"""From a model config to a Llava and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import cached_file, is_flash_attn_2_available

from llava_ds.config import ModelConfig
from llava_ds.errors import BackendUnavailableError, ConfigError
from llava_ds.models.llava import Llava
from llava_ds.models.projector import build_projector
from llava_ds.models.vision_tower import build_tower
from llava_ds.ops import splice_cuda
from llava_ds.text.sentencepiece_tokenizer import is_llama_like, load_published_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By ``train.precision``."""


@dataclass(frozen=True)
class Backend:
    """A backend that was chosen once, and why."""

    name: str
    reason: str


def resolve_attention(asked: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Backend:
    """The attention implementation: what was asked for, or for ``auto`` the best that works here.

    Raises BackendUnavailableError when flash attention is asked for by name and cannot run.
    """
    why_not = _why_no_flash_attention(device, dtype)
    if asked == "auto":
        if why_not is None:
            return Backend("flash_attention_2", "flash-attn is installed and the device is CUDA")
        return Backend("sdpa", f"flash attention is not usable: {why_not}")
    if asked == "flash_attention_2" and why_not is not None:
        raise BackendUnavailableError(
            f"model.attn_implementation=flash_attention_2 cannot run: {why_not}.\n"
            "  Install the extra llava_ds[flash] on a CUDA machine and train in bf16 or fp16 (train.precision), "
            "or use auto or sdpa."
        )
    return Backend(asked, "asked for by name")


def _why_no_flash_attention(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "no CUDA device"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 and bf16 only, and the model is in {str(dtype).removeprefix('torch.')}"
    return None if is_flash_attn_2_available() else "the package flash-attn is not installed"


def resolve_packing(asked: str, attention: Backend) -> Backend:
    """Packed or padded micro-batches: what was asked for, or for ``auto`` the cheaper one under this attention.

    Only flash attention skips the pairs of different samples in a packed row; sdpa and eager compute and mask all
    of them, which costs more than padding does.
    """
    if asked != "auto":
        return Backend(asked, "asked for by name")
    if attention.name == "flash_attention_2":
        return Backend("packed", "flash attention skips the pairs of different samples")
    return Backend("padded", f"{attention.name} would compute the pairs of different samples too")


def resolve_splice(asked: str, projector: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """What projects and splices: what was asked for, or for ``auto`` the one that should be faster and works here.

    ``fused`` is the CUDA kernel; ``library`` is cuBLAS and index operations, or their like on the CPU.

    Raises BackendUnavailableError when the kernel is asked for by name and cannot run.
    """
    if asked == "library":
        return Backend(asked, "asked for by name")
    # Asking whether the kernel runs compiles it: not where it is not wanted.
    why_library = _why_library(projector, device, dtype) if asked == "auto" else None
    why_not = why_library or splice_cuda.why_not_fused(device, dtype)
    if why_not is None:
        return Backend("fused", "the kernel passed its check here" if asked == "auto" else "asked for by name")
    if asked == "auto":
        return Backend("library", why_library or f"the fused kernel is not usable: {why_not}")
    raise BackendUnavailableError(
        f"model.splice=fused cannot run: {why_not}.\n  Use auto or library, which compute the same."
    )


def _why_library(projector: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return None
    if dtype == torch.float32:
        return "in fp32, where the fused kernel has no tensor cores, cuBLAS should be faster"
    if projector == "mlp2x_gelu" and torch.cuda.get_device_capability(device) >= (9, 0):
        return "cuBLAS should be faster in the second layer of mlp2x_gelu from compute capability 9.0 on"
    return None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of an LLM folder or name. Raises ConfigError when there is none.

    Where a model was published with ``tokenizer.model`` only (as Vicuna was), transformers gives other ids than its
    LLM was trained with: there the tokenizer is ours.
    """
    try:
        model_file = _find_file(name, "tokenizer.model")
        if model_file and not _find_file(name, "tokenizer.json") and is_llama_like(model_file):
            return load_published_tokenizer(lambda file: _find_file(name, file))
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model.llm={name!r}: no tokenizer can be loaded: {error}\n"
            "  Give a transformers folder, or a name that is downloaded already or can be."
        ) from error


def _find_file(name: str, file: str) -> Path | None:
    """A file of an LLM folder or hub name, or None where it has none or the hub cannot be reached."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def llm_folder(name: str) -> Path:
    """Where the files of an LLM lie: the folder itself, or the snapshot of a hub name that was downloaded.

    Raises ConfigError when there is none.
    """
    file = _find_file(name, "config.json")
    if file is None:
        raise ConfigError(f"model.llm={name!r} has no config.json; give a transformers folder or name")
    return file.parent.absolute()


def read_text_config(folder: Path) -> dict[str, Any]:
    """The config of a folder's LLM as plain data. Raises ConfigError when it cannot be read."""
    try:
        return dict(AutoConfig.from_pretrained(folder).get_text_config().to_dict())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the LLM of {folder} cannot be read: {error}\n  Give a transformers folder.") from error


@contextmanager
def on_one_rank() -> Iterator[None]:
    """Models that are built here are not partitioned over the ranks, whether ZeRO-3 is on or not."""
    held = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = held


@contextmanager
def without_memory() -> Iterator[None]:
    """Models that are built here have shapes but no weights, on this rank alone."""
    with on_one_rank(), torch.device("meta"):
        yield


@dataclass(frozen=True)
class LlmLayout:
    """Names and shapes of a causal LM's weights in memory; a tied one stands once.

    ``word_tables`` are the names of those with one row for each word.
    """

    shapes: dict[str, tuple[int, ...]]
    word_tables: frozenset[str]


def describe_llm(raw: dict[str, Any]) -> LlmLayout:
    """What the causal LM of a transformers config as plain data holds; nothing is allocated."""
    with without_memory():
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    llm.tie_weights()
    values = llm.state_dict(keep_vars=True)
    names: dict[int, str] = {}  # the first name of each: a tied one has two
    for name, value in values.items():
        names.setdefault(id(value), name)
    tables = [
        value for module in (llm.get_input_embeddings(), llm.get_output_embeddings()) if module is not None
        for value in module.parameters()
    ]
    return LlmLayout(
        {name: tuple(values[name].shape) for name in names.values()}, frozenset(names[id(table)] for table in tables)
    )


def build_llm(config: ModelConfig, attn_implementation: str, dtype: torch.dtype, seed: int) -> Any:
    """The causal LM, pretrained or random.

    While an ``HfDeepSpeedConfig`` of ZeRO-3 is alive, transformers builds and loads it partitioned: no rank
    holds all of it.
    """
    try:
        if config.llm_init == "pretrained":
            return AutoModelForCausalLM.from_pretrained(
                config.llm, dtype=dtype, attn_implementation=attn_implementation
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            llm_config = AutoConfig.from_pretrained(config.llm)
            return AutoModelForCausalLM.from_config(llm_config, dtype=dtype, attn_implementation=attn_implementation)
    except OSError as error:
        raise ConfigError(
            f"model.llm={config.llm!r} cannot be loaded: {error}\n  Give a transformers folder or name."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"model.llm={config.llm!r} cannot be built with {attn_implementation} attention: {error}\n"
            "  Where the architecture lacks that attention, set model.attn_implementation=eager; else give another LLM."
        ) from error


def checkpoint_activations(llm: Any) -> None:
    """Lets the layers of an LLM compute their activations again in the backward pass."""
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only reentrant checkpointing needs inputs with a gradient. The hook that transformers puts on the embedding for it
    # would have the splice call the embedding instead of reading its table.
    llm.disable_input_require_grads()


def build_llm_from_config(raw: dict[str, Any], attn_implementation: str, dtype: torch.dtype) -> Any:
    """A causal LM of a transformers config as plain data, its weights to be loaded by the caller."""
    config = AutoConfig.for_model(**raw)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)


def build_empty_llm(raw: dict[str, Any], attn_implementation: str, dtype: torch.dtype) -> Any:
    """As ``build_llm_from_config``, without the minutes that random numbers for billions of weights take.

    What is in its weights is undefined.
    """
    with no_init_weights():
        llm = build_llm_from_config(raw, attn_implementation, dtype)
    llm.tie_weights()
    return llm


def llm_hidden_size(name: str) -> int:
    """D of an LLM folder or name. Raises ConfigError when there is none."""
    try:
        return int(AutoConfig.from_pretrained(name).get_text_config().hidden_size)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.llm={name!r} cannot be loaded: {error}\n  Give a transformers folder or name."
        ) from error


def build_model(
    config: ModelConfig, attn_implementation: str, dtype: torch.dtype, seed: int, fused: bool = False
) -> Llava:
    """The whole model, every parameter not yet frozen or thawed (see ``apply_freezing``)."""
    tower = build_tower(config.vision_tower, config.vision_pretrained, config.select_layer).to(dtype)
    llm = build_llm(config, attn_implementation, dtype, seed)
    if config.gradient_checkpointing:
        checkpoint_activations(llm)
    width = llm.config.get_text_config().hidden_size
    projector = build_projector(config.projector, tower.spec.width, width, seed).to(dtype)
    return Llava(tower, projector, llm, zero_features=config.zero_features, fused=fused)
