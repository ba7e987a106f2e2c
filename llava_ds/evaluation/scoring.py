"""Scores a file of predictions by the rules of its task."""

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

    ``second`` holds the predictions of a text-only model; ``ask`` completes that file through ``endpoint`` first, each
    problem after ``num_shots`` solved ones.
    """

    predictions: Path
    problems: Path | None = None
    splits: Path | None = None
    split: str = "test"
    official: bool = False
    ensemble: str | None = None
    second: Path | None = None
    ask: bool = False
    num_shots: int = 2
    endpoint: ClientOptions = field(default_factory=ClientOptions)


@dataclass(frozen=True)
class Score:
    """``report`` goes into a JSON file, ``lines`` onto the terminal."""

    report: dict[str, Any]
    lines: list[str]
