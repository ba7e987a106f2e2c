"""The tasks that ``tools/evaluate`` knows. Another one is an entry of ``TASKS`` and a row in docs/evaluation.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ds.errors import ConfigError
from llava_ds.evaluation import exact_match, llava_bench_questions, scienceqa_questions
from llava_ds.evaluation.predict import Log
from llava_ds.evaluation.questions import Question
from llava_ds.evaluation.scienceqa_task import score_scienceqa
from llava_ds.evaluation.scoring import Score, ScoreRequest
from llava_ds.inference.session import Sampling


@dataclass(frozen=True)
class EvaluationRequest:
    """What ``tools/evaluate`` is asked for. ``data`` is a folder for ScienceQA, else a file of questions."""

    checkpoint: Path
    task: str
    data: Path
    image_root: Path | None = None
    split: str = "test"
    prompt_format: str = "QCM-LEA"
    directly: bool = False
    image_first: bool = True
    predictions: Path | None = None
    batch_size: int = 64
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    precision: str = "fp32"


@dataclass(frozen=True)
class Task:
    """What differs between tasks.

    ``record`` is an answer as it stands in the file of predictions, from the question, the answer and the model's name.
    """

    read: Callable[[EvaluationRequest], list[Question]]
    record: Callable[[Question, str, str], dict[str, Any]]
    score: Callable[[EvaluationRequest, Sequence[Question], Sequence[str], Log], Score]
    max_new_tokens: int
    needs_file: bool = True


def _quickstart_score(
    _request: EvaluationRequest, questions: Sequence[Question], answers: Sequence[str], _log: Log
) -> Score:
    report = exact_match.score(questions, answers)
    shown = {key: report[key] for key in ("accuracy", "num_questions")}
    return Score(report, [json.dumps(shown, indent=1)])


def _file_of(request: EvaluationRequest) -> Path:
    if request.predictions is None:
        raise ConfigError(f"--task {request.task} needs a file of predictions")
    return request.predictions


def _scienceqa_score(
    request: EvaluationRequest, _questions: Sequence[Question], _answers: Sequence[str], log: Log
) -> Score:
    problems, splits = (request.data / name for name in ("problems.json", "pid_splits.json"))
    return score_scienceqa(ScoreRequest(_file_of(request), problems, splits, request.split), log)


def _llava_bench_score(
    request: EvaluationRequest, questions: Sequence[Question], _answers: Sequence[str], _log: Log
) -> Score:
    file = _file_of(request)
    report = {"task": "llava_bench", "num_questions": len(questions), "answers": str(file)}
    return Score(report, [f"{len(questions)} answers in {file}; tools/judge --answers {file} scores them"])


def _plain_record(question: Question, answer: str, model: str) -> dict[str, Any]:
    return {"id": question.id, "text": answer, "prompt": question.turns[-1].text, "model": model}


def _llava_bench_record(question: Question, answer: str, model: str) -> dict[str, Any]:
    asked = question.record
    kept = {key: asked[key] for key in ("question_id", "image", "category") if key in asked}
    return kept | {"prompt": asked["text"], "text": answer, "model": model}


TASKS: dict[str, Task] = {
    "quickstart": Task(
        lambda asked: exact_match.read_questions(asked.data, asked.image_root),
        _plain_record, _quickstart_score, exact_match.MAX_NEW_TOKENS, needs_file=False,
    ),
    "scienceqa": Task(
        lambda asked: scienceqa_questions.read_questions(
            asked.data, asked.image_root, asked.split, asked.prompt_format, asked.directly, asked.image_first
        ),
        _plain_record, _scienceqa_score, scienceqa_questions.MAX_NEW_TOKENS,
    ),
    "llava_bench": Task(
        lambda asked: llava_bench_questions.read_questions(asked.data, asked.image_root),
        _llava_bench_record, _llava_bench_score, llava_bench_questions.MAX_NEW_TOKENS,
    ),
}
