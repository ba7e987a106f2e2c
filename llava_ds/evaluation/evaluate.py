"""One evaluation: a task's questions, a model's answers, and their score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.load import find_checkpoint
from llava_ds.constants import COMPLETE_MARKER
from llava_ds.distributed import Ranks, check_agreement, run_on_main_first, select_device
from llava_ds.errors import ConfigError
from llava_ds.evaluation import exact_match, llava_bench_questions, scienceqa_questions
from llava_ds.evaluation.predict import Log, predict
from llava_ds.evaluation.prediction_file import PredictionFile
from llava_ds.evaluation.questions import Question, hash_questions
from llava_ds.evaluation.scienceqa_task import score_scienceqa
from llava_ds.evaluation.scoring import Score, ScoreRequest
from llava_ds.inference.session import Sampling, Session, load_session
from llava_ds.models.build import DTYPES


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


TASKS = {
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


def check_options(task: str, data: Path | None, predictions: Path | None) -> None:
    """Raises ConfigError that lists what the task needs besides."""
    lacking = ["--data FILE, its questions"] if task == "llava_bench" and not data else []
    lacking += ["--predictions FILE.jsonl, where its answers go"] if TASKS[task].needs_file and not predictions else []
    if lacking:
        raise ConfigError(f"--task {task} needs " + " and ".join(lacking))


def evaluate(request: EvaluationRequest, ranks: Ranks, log: Log) -> Score | None:
    """Asks every question of the task that has no answer yet; the score on rank 0, None on others.

    Raises CheckpointError, ConfigError or DataError, of bad input before a model is loaded.
    """
    task = TASKS[request.task]
    identity = identify_checkpoint(request.checkpoint)
    questions = run_on_main_first(ranks, partial(task.read, request))
    sampling = replace(request.sampling, max_new_tokens=request.max_new_tokens or task.max_new_tokens)
    settings = {
        "task": request.task,
        "checkpoint": identity,
        "questions": hash_questions(questions),
        "precision": request.precision,
        **asdict(sampling),
    }
    check_agreement(ranks, "the settings of the evaluation", json.dumps(settings))
    kept = PredictionFile(request.predictions, settings) if request.predictions else None
    answers = predict(
        questions, partial(_open_session, request, ranks), sampling, request.batch_size, ranks, kept, log
    )
    if not ranks.is_main:
        return None
    if kept:
        model = str(request.checkpoint)
        kept.finish([task.record(*pair, model) for pair in zip(questions, answers, strict=True)])
    return task.score(request, questions, answers, log)


def identify_checkpoint(path: Path) -> str:
    """A hash that another checkpoint, or another state of this one, does not have; weights are not read.

    Raises CheckpointError when there is none.
    """
    folder = find_checkpoint(path)
    marker = folder / COMPLETE_MARKER
    if marker.is_file() and (manifest := marker.read_text().strip()):
        return manifest[:16]  # the hash of all hashes
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    facts = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _open_session(request: EvaluationRequest, ranks: Ranks) -> Session:
    return load_session(request.checkpoint, select_device(ranks), DTYPES[request.precision])


def _file_of(request: EvaluationRequest) -> Path:
    if request.predictions is None:
        raise ConfigError(f"--task {request.task} needs a file of predictions")
    return request.predictions
