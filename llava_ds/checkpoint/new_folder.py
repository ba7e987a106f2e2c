"""A folder that an export is written into: there is room for it, and it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_ds.checkpoint.writer import Progress
from llava_ds.durable import sync_to_disk
from llava_ds.errors import CheckpointError

_SPARE_BYTES = 64 << 20  # tokenizer and configs

Phases = Callable[[str, int], Progress]
"""Is told what begins and how many bytes it takes; what it returns is told of bytes as they are done."""


def no_phases(name: str, num_bytes: int) -> Progress:
    """Says nothing."""
    return lambda _: None


def refuse_existing(out: Path) -> None:
    """Raises CheckpointError when there is something at ``out``."""
    if out.exists():
        raise CheckpointError(f"{out} exists already; give another folder, or remove it first")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises CheckpointError when the disk of ``folder`` has no room for weights of ``num_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{folder.parent} has {free} bytes free, {num_bytes + _SPARE_BYTES} are needed.\n"
            "  Make room, or choose another folder."
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` if all goes well, and else is removed.

    Raises CheckpointError when it cannot be made.
    """
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be made: {error}; give another folder") from error
    try:
        yield work
        work.rename(out)
        sync_to_disk(out.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
