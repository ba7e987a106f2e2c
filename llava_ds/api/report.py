"""What a run asked, got and paid."""

from __future__ import annotations

from typing import Any


class ApiReport:
    """Counts of a client's run."""

    def to_json(self) -> dict[str, Any]:
        """All counts as JSON values."""
        raise NotImplementedError
