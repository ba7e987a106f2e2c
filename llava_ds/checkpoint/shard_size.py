"""How large a file of exported weights may become before the next one begins."""

from __future__ import annotations

import math

from llava_ds.errors import ConfigError

MAX_SHARD_BYTES = 5_000_000_000
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size like 5GB. Raises ConfigError for anything else."""
    try:
        num_bytes = float(text[:-2]) * _UNITS[text[-2:].upper()]
    except (ValueError, KeyError):
        num_bytes = math.nan
    if not 1 <= num_bytes < math.inf:
        raise ConfigError(f"{text!r} is not a size; write it as 5GB or 500MB")
    return int(num_bytes)
