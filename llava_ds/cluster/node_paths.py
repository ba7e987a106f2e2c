"""What a node sees of the files and folders that a recipe names, cheaply: no large file is read whole."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from llava_ds.config import PREPARED, RunConfig

_END_BYTES = 1 << 20
"""So much of the start and of the end of a file goes into its digest."""
_MAX_ENTRIES = 10_000
_NUM_READERS = 8
"""A file system behind a network answers many questions at once."""


@dataclass(frozen=True)
class Need:
    """A path that a setting names."""

    setting: str
    path: str
    required: bool = True
    """False where it may be missing on all nodes: it may be a name instead, or it is made by the run."""
    compared: bool = True
    """Whether its content must be the same on every node."""


@dataclass(frozen=True)
class PathReport:
    """What one node sees of a path."""

    path: str
    kind: Literal["file", "folder", "missing", "unreadable"]
    size_bytes: int = 0
    """Of a folder: the sum over the entries that were looked at."""
    num_entries: int = 0
    digest: str = ""
    """xxh128 of a file's size, first and last MiB; of the names and sizes of a folder's entries."""
    error: str = ""
    required: bool = True
    compared: bool = True


def list_needs(config: RunConfig) -> tuple[list[Need], list[str]]:
    """The local paths of a recipe, and notes about those that are left out."""
    named = [*_data_needs(config), *_model_needs(config)]
    needs = [need for need in named if PREPARED not in need.path]
    notes = [
        f"{need.setting}={need.path}: not looked at, as what the recipe prepares is not there yet"
        for need in named if PREPARED in need.path
    ]
    return needs, notes


def _data_needs(config: RunConfig) -> list[Need]:
    needs = []
    for number, source in enumerate(config.data.sources()):
        group = "data" if config.data.path is not None else f"data.mixture[{number}]"
        if "://" not in source.path:
            needs.append(Need(f"{group}.path", _without_pattern(source.path)))
        if source.image_root is not None and "://" not in source.image_root:
            needs.append(Need(f"{group}.image_root", source.image_root))
    if config.data.feature_cache is not None:
        needs.append(Need("data.feature_cache", config.data.feature_cache, required=False, compared=False))
    return needs


def _without_pattern(path: str) -> str:
    """The folder of a pattern of shards such as ``shards/{000..009}.tar``; another path as it is."""
    name = Path(path).name
    is_pattern = "{" in name and PREPARED not in name and not Path(path).exists()
    return str(Path(path).parent) if is_pattern else path


def _model_needs(config: RunConfig) -> list[Need]:
    model = config.model
    or_names = {
        "model.vision_tower": model.vision_tower, "model.vision_pretrained": model.vision_pretrained,
        "model.llm": model.llm,
    }
    needs = [
        Need(setting, path, required=Path(path).is_absolute() or path.startswith("."))
        for setting, path in or_names.items() if path is not None
    ]
    return needs + ([Need("model.init_from", model.init_from)] if model.init_from is not None else [])


def look_at_path(need: Need) -> PathReport:
    """What is there. Raises nothing: what cannot be read is a finding."""
    path = Path(need.path).absolute()
    try:
        if path.is_dir():
            return _look_at_folder(path, need)
        size, digest = _digest_file(path)
        return PathReport(str(path), "file", size, 0, digest, "", need.required, need.compared)
    except (FileNotFoundError, NotADirectoryError):
        return PathReport(str(path), "missing", required=need.required, compared=need.compared)
    except OSError as error:
        return PathReport(
            str(path), "unreadable", error=str(error), required=need.required, compared=need.compared
        )


def _digest_file(file: Path) -> tuple[int, str]:
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        digest = xxhash.xxh3_128(str(size).encode() + b"\0" + handle.read(_END_BYTES))
        handle.seek(max(_END_BYTES, size - _END_BYTES))
        digest.update(handle.read(_END_BYTES))
    return size, digest.hexdigest()


def _look_at_folder(folder: Path, need: Need) -> PathReport:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        sizes = list(pool.map(lambda name: _entry_size(folder / name), names[:_MAX_ENTRIES]))
    digest = xxhash.xxh3_128(str(len(names)).encode())
    for name, size in zip(names, sizes, strict=False):
        digest.update(f"\0{name}\0{size}".encode(errors="surrogateescape"))
    total = sum(size for size in sizes if size is not None)
    return PathReport(
        str(folder), "folder", total, len(names), digest.hexdigest(), "", need.required, need.compared
    )


def _entry_size(entry: Path) -> int | None:
    """Bytes of a file; None of a folder, whose size is its file system's own affair, and of what leads nowhere."""
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except OSError:
        return None
