"""What was exported computes what its source computes: both on one fixed input, and the largest difference."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from llava_ds.checkpoint.formats.clip import StoredTower
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.load import assemble
from llava_ds.checkpoint.stored_model import StoredModel
from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.llava import Llava
from llava_ds.models.vision_tower import build_tower_from_spec
from llava_ds.ops.row_plan import plan_rows

PARITY_FILE = "parity.json"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference that passes, as a share of the largest value.

Measured with a tower and an LLM of 24 layers each, random weights, transformers against ours: 9e-7 in fp32, 1.9e-2 in
bf16, 2.4e-3 in fp16; each of the two is as far from fp32 as from the other. In fp32 a LayerNorm that is one per cent
too large is found; 16 bits find swapped, missing and badly scaled weights only, so they are for models beyond the
memory (see ``choose_dtype``).
"""

_SEED = 20230417
_TOKENS_BEFORE, _TOKENS_AFTER = 5, 11


@dataclass(frozen=True)
class Comparison:
    """The largest difference of ``what`` between a source and what ``reader`` reads of its export."""

    reader: str
    what: str
    dtype: str
    largest_difference: float
    largest_value: float
    tolerance: float

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest value."""
        return self.largest_difference / self.largest_value if self.largest_value else self.largest_difference

    @property
    def passes(self) -> bool:
        """Whether the difference is small enough; a NaN never is."""
        return self.relative <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``parity.json`` has it."""
        return asdict(self) | {"relative": self.relative}

    def __str__(self) -> str:
        return (
            f"{self.what} through {self.reader} in {self.dtype}: largest difference {self.largest_difference:.3g} of "
            f"{self.largest_value:.3g} ({self.relative:.2g}; up to {self.tolerance:g} passes)"
        )


def compare(reader: str, what: str, source: torch.Tensor, export: torch.Tensor, dtype: torch.dtype) -> Comparison:
    """Compares values that were computed in ``dtype``. Raises CheckpointError for another shape."""
    if source.shape != export.shape:
        raise CheckpointError(
            f"{what} through {reader}: {tuple(export.shape)} of the export, {tuple(source.shape)} of the source"
        )
    source, export = source.double(), export.double()
    return Comparison(
        reader, what, str(dtype).removeprefix("torch."), (source - export).abs().max().item(),
        source.abs().max().item(), TOLERANCES[dtype],
    )


def refuse_failures(comparisons: list[Comparison], out: Path) -> None:
    """Raises CheckpointError that lists every comparison that does not pass."""
    failed = [str(comparison) for comparison in comparisons if not comparison.passes]
    if failed:
        raise CheckpointError(
            f"{out} is not written, as it does not compute what its source does:\n  " + "\n  ".join(failed)
            + "\n  This is an error in llava_ds, or the disk's; please report it with the names of both layouts."
        )


def choose_dtype(model: StoredModel) -> torch.dtype:
    """What to compute in: fp32, where only the conversion differs; the stored precision where memory is short.

    Raises ConfigError with both numbers where that does not fit, either.
    """
    elements = sum(value.numel for value in model.weights.values())
    available = _available_bytes()
    for dtype in (torch.float32, model.dtype):
        if 1.3 * elements * dtype.itemsize < available:
            return dtype
    raise ConfigError(
        f"comparing logits needs the model in memory, {elements * model.dtype.itemsize / 2**30:.1f} GiB and a third "
        f"more, and {available / 2**30:.1f} GiB are free; use a larger machine, or --no-logits"
    )


def _available_bytes() -> float:
    file = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read_text(), re.M) if file.is_file() else None
    return int(found[1]) * 1024 if found else math.inf


def fixed_input(model: StoredModel) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, S] ids with one image in the middle, and [1, 3, H, W] pixels; the same for every layout of a model."""
    generator = torch.Generator().manual_seed(_SEED)
    size, num_words = model.tower.image_size, model.text_config["vocab_size"]
    words = torch.randint(0, num_words, (_TOKENS_BEFORE + _TOKENS_AFTER,), generator=generator)
    image = torch.full((model.tower.num_patches,), IMAGE_TOKEN_INDEX)
    ids = torch.cat([words[:_TOKENS_BEFORE], image, words[_TOKENS_BEFORE:]])[None]
    return ids, torch.randn(1, 3, size, size, generator=generator)


def stored_logits(model: StoredModel, dtype: torch.dtype) -> torch.Tensor:
    """[S, V] logits of a stored model on its fixed input, its weights rounded as they are written.

    Nothing of it stays in memory.
    """
    ids, pixels = fixed_input(model)
    weights = {name: value.cast(model.dtype) for name, value in model.weights.items()}
    # What a blind run was trained to ignore is in its weights all the same.
    loaded = assemble(replace(model, weights=weights, zero_features=False), "sdpa", dtype)
    logits = _logits(loaded.model, ids, pixels)
    _free(loaded.model)
    return logits[:, : model.text_config["vocab_size"]]


def _free(model: nn.Module) -> None:
    """Gives a model's memory back now: modules refer to one another, so Python would wait for its next collection."""
    model.to("meta")


@torch.no_grad()
def _logits(model: Llava, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    embeds = model.inputs_embeds(ids, model.patch_features(pixels), plan_rows(ids))
    return model.llm(inputs_embeds=embeds, use_cache=False).logits[0].float()


@torch.no_grad()
def transformers_logits(model: StoredModel, folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """[S, V] logits of transformers' own LLaVA from ``folder`` on the fixed input of ``model``.

    Raises CheckpointError that lists weights which transformers did not find, or did not know.
    """
    theirs, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    problems = [f"{kind}: {', '.join(sorted(map(str, names)))}" for kind, names in info.items() if names]
    if problems:
        raise CheckpointError(f"{folder} does not load in transformers as it was written: {'; '.join(problems)}")
    ids, pixels = fixed_input(model)
    ids = torch.where(ids == IMAGE_TOKEN_INDEX, theirs.config.image_token_id, ids)
    logits = theirs.eval()(input_ids=ids, pixel_values=pixels.to(dtype), use_cache=False).logits[0].float()
    _free(theirs)
    return logits[:, : model.text_config["vocab_size"]]


@torch.no_grad()
def tower_features(tower: StoredTower, select_layer: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, P, C] features of a stored tower on the fixed picture."""
    built = build_tower_from_spec(tower.spec, select_layer)
    state = {name: value.whole().to(dtype) for name, value in tower.weights.items()}
    built.visual.load_state_dict(state, assign=True)
    return built(_picture(tower)).float()


@torch.no_grad()
def clip_features(tower: StoredTower, folder: Path, select_layer: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, P, C] features of transformers' own CLIP from ``folder``, as LLaVA takes them, on the fixed picture."""
    theirs = CLIPVisionModel.from_pretrained(folder, dtype=dtype).eval()
    out = theirs(_picture(tower).to(dtype), output_hidden_states=True)
    return out.hidden_states[select_layer][:, 1:].float()


def _picture(tower: StoredTower) -> torch.Tensor:
    size = tower.spec.image_size
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(_SEED))


def compare_tensors(
    reader: str, source: Mapping[str, LazyTensor], export: Mapping[str, LazyTensor], dtype: torch.dtype
) -> Comparison:
    """Compares every tensor; none may differ at all. Raises CheckpointError for other names or shapes."""
    if source.keys() != export.keys():
        raise CheckpointError(
            f"tensors through {reader}: {sorted(export)} of the export, {sorted(source)} of the source"
        )
    parts = [compare(reader, "tensors", source[name].cast(dtype).whole(), export[name].whole(), dtype)
             for name in source]
    return replace(
        parts[0], tolerance=0.0, largest_difference=max(part.largest_difference for part in parts),
        largest_value=max(part.largest_value for part in parts),
    )
