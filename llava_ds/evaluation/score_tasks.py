"""The tasks that ``tools/score`` knows. Another one is a function here, and a section of docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Callable

from llava_ds.evaluation.scienceqa_task import score_scienceqa
from llava_ds.evaluation.scoring import Log, Score, ScoreRequest

TASKS: dict[str, Callable[[ScoreRequest, Log], Score]] = {"scienceqa": score_scienceqa}
