"""``mm_projector.bin``: the projector alone, as the original LLaVA code saves it after its first stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from llava_ds.checkpoint.keymap import Weights, list_some
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.tensor_files import open_tensors
from llava_ds.errors import CheckpointError

PROJECTOR_NAMES = {
    "linear": ("weight", "bias"),
    "mlp2x_gelu": ("0.weight", "0.bias", "2.weight", "2.bias"),
}
"""A projector's weights by its kind, as ours below ``projector.`` and as the original's below ``mm_projector.``."""

_PREFIX = "mm_projector."
# With mm_use_im_start_end the original code saves the word embeddings beside the projector.
_WORDS = re.compile(r"(^|\.)(embed_tokens|embed_in)\.")


def read_projector_file(file: Path) -> Weights:
    """The projector of a file, names as ours below ``projector.``; whatever stands before ``mm_projector.`` is left.

    Raises CheckpointError that lists what is there when it is neither ``linear`` nor ``mlp2x_gelu``.
    """
    stored = {name: value for name, value in open_tensors([file]).items() if not _WORDS.search(name)}
    weights = {name.rpartition(_PREFIX)[2]: value for name, value in stored.items()}
    if len(weights) < len(stored) or kind_of_projector(weights) is None:
        kinds = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in PROJECTOR_NAMES.items())
        raise CheckpointError(
            f"{file} holds no projector that is known here. It has {list_some(stored) or 'nothing'}.\n"
            f"  Known are, alone or behind '{_PREFIX}', {kinds}."
        )
    check_projector(weights, str(file))
    return weights


def holds_words(file: Path) -> bool:
    """Whether a projector's file also has word embeddings, which ``read_projector_file`` leaves."""
    return any(_WORDS.search(name) for name in open_tensors([file]))


def kind_of_projector(weights: Mapping[str, LazyTensor]) -> str | None:
    """``linear`` or ``mlp2x_gelu``, by the names below ``projector.``; None for anything else."""
    return next((kind for kind, names in PROJECTOR_NAMES.items() if set(names) == weights.keys()), None)


def projector_widths(weights: Mapping[str, LazyTensor]) -> tuple[int, int]:
    """C and D of a projector: the widths of the tower and of the LLM that it stands between."""
    first, last = ("weight", "weight") if "weight" in weights else ("0.weight", "2.weight")
    return weights[first].shape[1], weights[last].shape[0]


def check_projector(weights: Mapping[str, LazyTensor], where: str) -> None:
    """Raises CheckpointError that lists every weight whose shape does not fit the others."""
    if any(value.shape == () or value.numel == 0 for value in weights.values()):
        raise CheckpointError(f"{where}: a weight of the projector is empty; the original code saved it from ZeRO-3")
    matrices = {name: value.shape for name, value in weights.items() if name.endswith("weight")}
    if any(len(shape) != 2 for shape in matrices.values()):
        raise CheckpointError(f"{where}: the projector's weights are {matrices}, not matrices")
    vision_width, width = projector_widths(weights)
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(weights, (width,))
    expected |= {n: (width, vision_width) if n in ("weight", "0.weight") else (width, width) for n in matrices}
    problems = [f"{name} is {weights[name].shape}, the others need {shape}" for name, shape in expected.items()
                if weights[name].shape != shape]
    if problems:
        raise CheckpointError(f"{where}: the projector does not fit itself: {'; '.join(problems)}")


def write_projector(weights: Mapping[str, LazyTensor], file: Path, dtype: torch.dtype) -> None:
    """Writes ``model.mm_projector.*`` in ``dtype``. Raises CheckpointError when the file cannot be written."""
    # Copies: of a slice, all that it is cut from would be saved.
    state = {f"model.{_PREFIX}{name}": value.cast(dtype).whole().clone() for name, value in weights.items()}
    try:
        torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be written: {error}; make room, or choose another folder") from error
