"""Where a run writes on a node: how much is free there, and whether a file can really be written."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llava_ds.cache import cache_folder

_TRIAL_BYTES = 4096


@dataclass(frozen=True)
class Place:
    """A folder that is written to."""

    path: str
    """The folder itself, or the nearest one above it that exists."""
    free_bytes: int
    error: str = ""
    """Why no file can be written there; empty where one was."""


def list_places(run_dir: Path) -> dict[str, Path]:
    """The folders that a run writes to, by what they are for: ``run_dir``, ``tmp``, ``shm`` and ``cache``.

    ``shm`` is where data-loader workers hand batches over.
    """
    return {"run_dir": run_dir, "tmp": _temporary_folder(), "shm": Path("/dev/shm"), "cache": cache_folder()}


def _temporary_folder() -> Path:
    """The one that Python takes, which passes over a ``TMPDIR`` that it cannot write to; else the one asked for."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path(os.environ.get("TMPDIR") or "/tmp")


def look_at_place(folder: Path, may_be_made: bool = True) -> Place:
    """Free bytes and a trial; ``may_be_made`` takes the nearest folder above one that does not exist yet.

    Raises nothing: what cannot be written is a finding.
    """
    try:
        found = nearest_folder(folder) if may_be_made else folder.absolute()
        free_bytes = _free_bytes(found)
    except OSError as error:
        return Place(str(folder.absolute()), 0, str(error))
    return Place(str(found), free_bytes, _try_writing(found))


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists. Raises OSError when one cannot be looked at."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _free_bytes(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def _try_writing(folder: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".llava_ds-preflight-") as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
    except OSError as error:
        return str(error)
    return ""
