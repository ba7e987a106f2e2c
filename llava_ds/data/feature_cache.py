"""Patch features of a frozen, unaugmented tower, computed once: exact, and opt-in (``data.feature_cache``).

Exact: what is read is bit for bit what the tower gave when the cache was filled. Computed again in batches of another
size or on another number of threads, fp32 features differ in their last bits (benchmarks/feature_cache.py counts them).

One folder for one (tower, block, picture size, aspect) key: an array that only grows and the table of its rows.
The table is replaced after the array has grown, so an interrupted run loses nothing that the table knows.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from llava_ds.errors import DataError


class FeatureCache:
    """Features [P, C] by image file, fp32. Pickles as its folder and table; each worker opens the map itself."""

    def __init__(self, folder: Path, rows: dict[str, int], feature_shape: tuple[int, int]) -> None:
        self.folder = folder
        self.rows = rows
        self.feature_shape = feature_shape
        self._map: np.ndarray | None = None

    def __call__(self, image: Path) -> torch.Tensor:
        """[P, C] features of an image file. Raises DataError for one that was not cached."""
        row = self.rows.get(str(image))
        if row is None:
            raise DataError(
                f"image {image} is not in the feature cache {self.folder}: it was missing, or did not decode",
                reason="image does not decode",
            )
        if self._map is None:
            self._map = np.memmap(self.folder / "features.f32", np.float32, "r").reshape(-1, *self.feature_shape)
        return torch.from_numpy(self._map[row].copy())

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_map": None}


def open_feature_cache(
    folder: Path,
    images: Sequence[Path],
    feature_shape: tuple[int, int],
    compute: Callable[[Sequence[Path]], torch.Tensor],
    skip_bad: bool = False,
    batch_size: int = 32,
    log: Callable[[str], None] = print,
) -> FeatureCache:
    """The cache in ``folder`` with features of all ``images``, computing those that are new or have changed.

    ``compute`` maps image files to features [I, P, C]. Two processes may call it: one waits for the other.
    Raises DataError for a picture that is missing or does not decode; with ``skip_bad`` it is left out, and asking the
    cache for it raises that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = _read_table(folder)
        states = {str(image): _state(image, skip_bad) for image in images}
        new = [image for image in images if states[str(image)] != table.get(str(image), [None, None])[1]]
        if new:
            log(f"feature cache: computing {len(new)} of {len(images)} images into {folder}")
            first = max((row for row, _ in table.values()), default=-1) + 1
            bad = _append(folder / "features.f32", first, new, feature_shape, compute, skip_bad, batch_size)
            rows = {str(image): first + number for number, image in enumerate(new)}
            table |= {name: [row, states[name]] for name, row in rows.items() if name not in bad}
            unfinished = folder / "table.json.tmp"
            unfinished.write_text(json.dumps(table))
            unfinished.rename(folder / "table.json")
    return FeatureCache(folder, {name: table[name][0] for name in states if name in table}, feature_shape)


def _append(
    file: Path,
    num_rows: int,
    images: Sequence[Path],
    feature_shape: tuple[int, int],
    compute: Callable[[Sequence[Path]], torch.Tensor],
    skip_bad: bool,
    batch_size: int,
) -> set[str]:
    """Writes a row for every image; returns the names of those that are bad, whose rows are zeros."""
    bad: set[str] = set()
    with file.open("ab") as array:
        array.truncate(num_rows * feature_shape[0] * feature_shape[1] * 4)  # what an interrupted run left
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            try:
                features = compute(batch)
            except DataError:
                if not skip_bad:
                    raise
                features = torch.stack([_one(image, feature_shape, compute, bad) for image in batch])
            array.write(features.float().cpu().contiguous().numpy().tobytes())
        array.flush()
        os.fsync(array.fileno())
    return bad


def _one(
    image: Path, feature_shape: tuple[int, int], compute: Callable[[Sequence[Path]], torch.Tensor], bad: set[str]
) -> torch.Tensor:
    try:
        return compute([image])[0]
    except DataError:
        bad.add(str(image))
        return torch.zeros(feature_shape)


def _read_table(folder: Path) -> dict[str, list]:
    file = folder / "table.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _state(image: Path, skip_bad: bool) -> str | None:
    try:
        found = image.stat()
    except FileNotFoundError as error:
        if skip_bad:
            return None
        raise DataError(f"image {image}: no such file; fix the path", reason="image file is missing") from error
    return f"{found.st_size}|{found.st_mtime_ns}"
