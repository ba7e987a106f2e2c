"""Files that are on disk, whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def replace_file(file: Path, text: str) -> None:
    """Writes a file such that it holds the old text or the new one, as ``replacing`` does."""
    with replacing(file) as new:
        new.write(text)


@contextmanager
def replacing(file: Path) -> Iterator[IO[str]]:
    """A new text file in UTF-8 that takes the place of ``file`` at the end, or is removed at an exception.

    Half a surrogate pair, which UTF-8 cannot hold, is written as JSON escapes it: texts of models and servers may hold
    one, and what they stand in must not be lost for it.
    """
    partial = file.with_name(f".{file.name}")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as new:
            yield new
        sync_to_disk(partial)
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_to_disk(file.parent)


def sync_to_disk(path: Path) -> None:
    """Returns when a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
