"""What a task's scorer is handed, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ds.api.options import ClientOptions

Log = Callable[[str], None]


@dataclass(frozen=True)
class ScoreRequest:
    """What ``tools/score`` is asked for.

    ``second`` holds the predictions of a text-only model. With ``ask_second`` it is written first: ``endpoint`` is
    asked every problem, each after ``num_shots`` solved ones.
    """

    predictions: Path
    problems: Path | None = None
    splits: Path | None = None
    split: str = "test"
    official: bool = False
    ensemble: str | None = None
    second: Path | None = None
    ask_second: bool = False
    num_shots: int | None = None
    endpoint: ClientOptions = field(default_factory=ClientOptions)

    @property
    def shots(self) -> int:
        """``num_shots``, 2 where nothing is said."""
        return 2 if self.num_shots is None else self.num_shots


@dataclass(frozen=True)
class Score:
    """``report`` is for a JSON file, None where nothing was scored (a dry run); ``lines`` are for the terminal."""

    report: dict[str, Any] | None
    lines: list[str]
