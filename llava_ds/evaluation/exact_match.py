"""Exact-match accuracy on short questions about single images, by kind of question."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import DataError
from llava_ds.inference.session import Sampling, Session
from llava_ds.schema import Turn

_KEYS = ("id", "image", "kind", "question", "answer")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Records ``{id, image, kind, question, answer}``. Raises DataError that names the file and the record."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a JSON list of {', '.join(_KEYS)}")
    try:
        records = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: expected a list of questions")
    for number, record in enumerate(records):
        missing = [key for key in _KEYS if not isinstance(record, dict) or key not in record]
        if missing:
            raise DataError(f"{path.name}[{number}]: lacks {', '.join(missing)}")
    return records


def evaluate(
    session: Session, questions: Sequence[dict[str, Any]], image_root: Path, batch_size: int = 64
) -> dict[str, Any]:
    """Asks every question and scores whole answers, ignoring case.

    Returns ``accuracy`` and ``num_questions`` by kind, and ``records`` with the answers.
    """
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        conversations = [[Turn("user", f"{IMAGE_PLACEHOLDER}\n{record['question']}")] for record in chunk]
        images = [[image_root / record["image"]] for record in chunk]
        answers += session.answer_batch(conversations, images, Sampling(max_new_tokens=32))
    hits: dict[str, list[bool]] = defaultdict(list)
    records = []
    for record, answer in zip(questions, answers, strict=True):
        correct = answer.strip().lower() == record["answer"].strip().lower()
        hits[record["kind"]].append(correct)
        records.append({**record, "prediction": answer, "correct": correct})
    return {
        "accuracy": {kind: sum(found) / len(found) for kind, found in hits.items()},
        "num_questions": {kind: len(found) for kind, found in hits.items()},
        "records": records,
    }
