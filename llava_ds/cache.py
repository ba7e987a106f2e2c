"""Where files go that can be made again and have no better place."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``LLAVA_DS_CACHE``, else ~/.cache/llava_ds. It may not exist yet."""
    return Path(os.environ.get("LLAVA_DS_CACHE") or Path.home() / ".cache" / "llava_ds").absolute()
