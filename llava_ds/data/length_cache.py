"""Measured lengths on disk: an array, and beside it what its numbers mean and its checksum."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava_ds.data.length_table import ROW


def load_rows(file: Path, num_records: int) -> tuple[np.ndarray, list[str]] | None:
    """What was kept, or None when it is not there, not whole or not what was written."""
    try:
        rows = np.load(file, mmap_mode="r")
        facts = json.loads(file.with_suffix(".json").read_text())
        fits = rows.dtype == ROW and rows.shape == (num_records,) and zlib.crc32(rows.data) == facts["crc32"]
        return (rows, list(facts["reasons"])) if fits else None
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        return None


def keep_rows(file: Path, rows: np.ndarray, reasons: list[str], log: Callable[[str], None]) -> None:
    """Writes the rows, or says why they are not kept."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _save(file, rows, reasons)
    except OSError as error:
        log(f"lengths are not kept, they will be measured again: {error}; set LLAVA_DS_CACHE to a folder of your own")


def _save(file: Path, rows: np.ndarray, reasons: list[str]) -> None:
    unfinished = file.with_name(f"{uuid.uuid4().hex}.tmp")
    unfinished.write_text(json.dumps({"reasons": reasons, "crc32": zlib.crc32(rows.data)}))
    unfinished.rename(file.with_suffix(".json"))
    with unfinished.open("wb") as out:
        np.save(out, rows)
        out.flush()
        os.fsync(out.fileno())
    unfinished.rename(file)
