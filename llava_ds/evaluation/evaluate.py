"""One evaluation: a task's questions, a model's answers, and their score."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from llava_ds.checkpoint.load import find_checkpoint
from llava_ds.constants import COMPLETE_MARKER
from llava_ds.distributed import Ranks, check_agreement, run_on_main_first, select_device
from llava_ds.errors import ConfigError
from llava_ds.evaluation.answer_tasks import TASKS, EvaluationRequest
from llava_ds.evaluation.predict import Log, predict
from llava_ds.evaluation.prediction_file import PredictionFile
from llava_ds.evaluation.questions import hash_questions
from llava_ds.evaluation.scoring import Score
from llava_ds.inference.session import Session, load_session
from llava_ds.models.build import DTYPES


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
