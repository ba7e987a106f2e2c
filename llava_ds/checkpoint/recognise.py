"""Which layout a path holds: told by what is in it, never by its name."""

from __future__ import annotations

from pathlib import Path

from llava_ds.checkpoint.json_file import read_json
from llava_ds.errors import CheckpointError

MERGED_FILE = "llava_ds.json"
PROJECTOR_FILE = "mm_projector.bin"
_WEIGHT_FILES = tuple(stem + end for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
ACCEPTED = (
    "a run folder or a checkpoint step of llava_ds, a merged folder, a transformers (llava-hf) folder, "
    f"an original LLaVA folder, or an {PROJECTOR_FILE} (or a folder that holds one)"
)


def recognise_layout(path: Path) -> str:
    """``llava_ds`` (a run or step), ``transformers``, ``original`` or ``projector``.

    Raises CheckpointError that says what is missing, or lists what is accepted.
    """
    if path.is_file():
        return "projector"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give {ACCEPTED}")
    if any(next(path.glob(name), None) for name in ("step.json", "run.json", "checkpoints", "weights-*-of-*")):
        return "llava_ds"
    if (path / MERGED_FILE).is_file():
        return "transformers"
    layout = _layout_of_config(path / "config.json")
    has_weights = any((path / name).is_file() for name in _WEIGHT_FILES)
    if layout and has_weights:
        return layout
    if (path / PROJECTOR_FILE).is_file():
        return "projector"
    if layout:
        raise CheckpointError(
            f"{path} has the config.json of the layout {layout}, but no weights (none of {', '.join(_WEIGHT_FILES)}); "
            "copy the folder again"
        )
    if has_weights and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has weights, but no config.json that says of what; copy the folder again")
    raise CheckpointError(f"{path} holds no checkpoint that can be read here; give\n  {ACCEPTED}")


def _layout_of_config(config: Path) -> str | None:
    raw = read_json(config) if config.is_file() else {}
    # The original code's first configs have the model type of transformers' LLaVA.
    if raw.keys() & {"mm_vision_tower", "mm_hidden_size", "mm_projector_type"}:
        return "original"
    return "transformers" if "vision_config" in raw and raw.get("model_type") == "llava" else None


def find_projector_file(path: Path) -> Path:
    """The file of a projector: the path itself, or ``mm_projector.bin`` in it."""
    return path if path.is_file() else path / PROJECTOR_FILE
