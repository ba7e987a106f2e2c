"""Where files go that can be made again and have no better place."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``LLAVA_DS_CACHE``, else ~/.cache/llava_ds. It may not exist yet."""
    return Path(os.environ.get("LLAVA_DS_CACHE") or _home() / ".cache" / "llava_ds").absolute()


def _home() -> Path:
    """The user's folder, or a temporary one of the user: in a container a user may have none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"user-{os.getuid()}"
