"""Patch features of a frozen, unaugmented tower, computed once: exact, and opt-in (``data.feature_cache``).

One folder for one (tower, picture size, aspect) key: a memory-mapped array and the table of its rows. The
table is written last and commits the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from llava_ds.errors import DataError


class FeatureCache:
    """Features [P, C] by image file, fp32. Pickles as its folder; each worker opens the map itself."""

    def __init__(self, folder: Path) -> None:
        table = json.loads((folder / "table.json").read_text())
        self.rows: dict[str, int] = table["rows"]
        self.shape: tuple[int, int, int] = tuple(table["shape"])
        self.folder = folder
        self._map: np.memmap | None = None

    def __call__(self, image: Path) -> torch.Tensor:
        """[P, C] features of an image file. Raises DataError for one that was not cached."""
        row = self.rows.get(str(image))
        if row is None:
            raise DataError(f"{image} is not in the feature cache {self.folder}; delete the folder to build it again")
        if self._map is None:
            self._map = np.memmap(self.folder / "features.f32", np.float32, "r", shape=self.shape)
        return torch.from_numpy(self._map[row].copy())

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_map": None}


def cache_folder(root: Path, tower_key: str, images: Sequence[Path]) -> Path:
    """The folder for these images under this tower: named by a hash over the key and every file's state."""
    digest = hashlib.sha256(tower_key.encode())
    for image in images:
        state = image.stat()
        digest.update(f"{image}|{state.st_size}|{state.st_mtime_ns}\n".encode())
    return root / digest.hexdigest()[:16]


def build_feature_cache(
    folder: Path,
    images: Sequence[Path],
    compute: Callable[[Sequence[Path]], torch.Tensor],
    batch_size: int = 32,
    log: Callable[[str], None] = print,
) -> FeatureCache:
    """Opens the cache in ``folder``, computing it first where it is not complete.

    ``compute`` maps image files to features [I, P, C].
    """
    if (folder / "table.json").is_file():
        return FeatureCache(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log(f"feature cache: computing {len(images)} images into {folder}")
    shape: tuple[int, ...] = (0,)
    with (folder / "features.f32").open("wb") as file:
        for start in range(0, len(images), batch_size):
            features = compute(images[start : start + batch_size]).float().cpu().contiguous()
            shape = (len(images), *features.shape[1:])
            file.write(features.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    table = {"rows": {str(image): row for row, image in enumerate(images)}, "shape": shape}
    unfinished = folder / "table.json.tmp"
    unfinished.write_text(json.dumps(table))
    unfinished.rename(folder / "table.json")
    return FeatureCache(folder)
