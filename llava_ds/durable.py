"""Files that are on disk, whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(file: Path, text: str) -> None:
    """Writes a file in UTF-8 such that it holds the old text or the new one, whatever happens."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    sync_to_disk(partial)
    partial.rename(file)
    sync_to_disk(file.parent)


def sync_to_disk(path: Path) -> None:
    """Returns when a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
