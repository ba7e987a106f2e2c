"""Where checkpoints lie, and when one is whole.

``run/run.json`` states the run; ``run/checkpoints/step-00000012/`` holds ``trainable.safetensors``, ``step.json``,
a copy of ``run.json`` and, written last, ``COMPLETE``. Frozen weights are not stored: they are named in ``run.json``.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from llava_ds.constants import COMPLETE_MARKER
from llava_ds.errors import CheckpointError

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def step_dir(run_dir: Path, step: int) -> Path:
    """The folder of an optimizer step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_steps(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run_dir.glob(f"checkpoints/step-*/{COMPLETE_MARKER}"))


def resolve_step(path: Path) -> Path:
    """The checkpoint that a run folder (its last step) or a step folder names.

    Raises CheckpointError when there is none, or it is not complete.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run folder or a checkpoint step")
    if path.name.startswith("step-"):
        if not (path / COMPLETE_MARKER).is_file():
            raise CheckpointError(f"{path} is not complete (no {COMPLETE_MARKER}); use an earlier step of the run")
        return path
    steps = list_steps(path)
    if not steps:
        raise CheckpointError(
            f"{path} holds no complete checkpoint (checkpoints/step-*/{COMPLETE_MARKER}); "
            "let the run reach its next save, or give another run"
        )
    return steps[-1]


def commit(folder: Path) -> None:
    """Marks a folder complete, after its files are on disk; on return the mark is on disk, too."""
    for file in folder.iterdir():
        sync_to_disk(file)
    marker = folder / COMPLETE_MARKER
    marker.write_text("")
    for path in (marker, folder, folder.parent):
        sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Returns when a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Whatever goes wrong while ``file`` is read becomes a CheckpointError that names it."""
    try:
        yield file
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}\n  The checkpoint is damaged: copy or merge it again, or use another step."
        ) from error


def write_safetensors_stream(
    path: Path,
    entries: Iterable[tuple[str, torch.Tensor]],
    header: Sequence[tuple[str, torch.dtype, Sequence[int]]],
) -> None:
    """Writes a safetensors file tensor after tensor, so that no more than one is in memory.

    ``header`` announces name, dtype and shape of the ``entries``, in their order. Raises CheckpointError when an
    entry is not what was announced.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in header:
        size = torch.Size(shape).numel() * dtype.itemsize
        table[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, value), expected in zip(entries, header, strict=True):
            got = (name, value.dtype, tuple(value.shape))
            if got != (expected[0], expected[1], tuple(expected[2])):
                raise CheckpointError(f"{path}: expected {expected}, got {got}")
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
