"""The small JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.layout import reading


def read_json(file: Path) -> dict[str, Any]:
    """What a file says. Raises CheckpointError that names it when it cannot be read, or holds something else."""
    with reading(file):
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not settings by name")
    return value


def write_json(file: Path, value: Any) -> None:
    """Writes plain data, to be read by people as well."""
    file.write_text(json.dumps(value, indent=1) + "\n")
