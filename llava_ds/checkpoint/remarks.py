"""What a user should know, but need not stop for: told to whoever listens."""

from __future__ import annotations

import sys
from collections.abc import Callable

Log = Callable[[str], None]


def say(line: str) -> None:
    """Where remarks go that nobody else takes: to stderr."""
    print(line, file=sys.stderr)
