"""Where files go that can be made again and have no better place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llava_ds.constants import COMPLETE_MARKER


def cache_folder() -> Path:
    """``LLAVA_DS_CACHE``, else ~/.cache/llava_ds. It may not exist yet."""
    return Path(os.environ.get("LLAVA_DS_CACHE") or _home() / ".cache" / "llava_ds").absolute()


def build_once(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder ``target`` by ``fill``, which gets an empty one beside it; it appears whole or not at all.

    A folder that holds ``COMPLETE`` is left alone, also where another process was faster.
    """
    if (target / COMPLETE_MARKER).is_file():
        return
    work = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        fill(work)
        (work / COMPLETE_MARKER).write_text("")
        if not (target / COMPLETE_MARKER).is_file():
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _home() -> Path:
    """The user's folder, or a temporary one of the user: in a container a user may have none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"user-{os.getuid()}"
