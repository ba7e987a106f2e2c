"""Exact-match accuracy on short questions about single images, by kind of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.data.sources.llava_json import read_json_list
from llava_ds.errors import DataError
from llava_ds.evaluation.question_rows import read_id
from llava_ds.evaluation.questions import Question, check_questions
from llava_ds.schema import Turn
from llava_ds.text.placement import place_images

MAX_NEW_TOKENS = 32
_KEYS = ("id", "image", "kind", "question", "answer")


def read_questions(path: Path, image_root: Path | None = None) -> list[Question]:
    """Records ``{id, image, kind, question, answer}``; images are under ``image_root``, by default the file's folder.

    Raises DataError that names the file and the record, or lists the first missing images and counts them all.
    """
    records = read_json_list(path, f"a JSON list of questions {{{', '.join(_KEYS)}}}")
    root = image_root or path.parent
    questions = [_parse(record, f"{path}[{number}]", root) for number, record in enumerate(records)]
    check_questions(questions, path, "Fix the paths, or give the folder that they start from with --image-root.")
    return questions


def _parse(record: Any, where: str, image_root: Path) -> Question:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {', '.join(_KEYS)}, got {type(record).__name__}")
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}; every question needs {', '.join(_KEYS)}")
    id = read_id(record, where, "id")
    wrong = [key for key in _KEYS[1:] if not isinstance(record[key], str)]
    if wrong:
        raise DataError(f"{where} id={id}: {', '.join(wrong)} must be text, got {record[wrong[0]]!r:.80}")
    if record["question"].count(IMAGE_PLACEHOLDER) > 1:
        raise DataError(f"{where} id={id}: more than one '{IMAGE_PLACEHOLDER}'; a question has one image")
    turn = Turn("user", place_images(record["question"], 1))
    return Question(id, (turn,), (image_root / record["image"],), where, record)


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Scores whole answers, ignoring case.

    Returns ``accuracy`` and ``num_questions`` by kind, and ``records`` with the answers.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    records = []
    for question, answer in zip(questions, answers, strict=True):
        correct = answer.strip().lower() == question.record["answer"].strip().lower()
        hits[question.record["kind"]].append(correct)
        records.append({**question.record, "prediction": answer, "correct": correct})
    return {
        "accuracy": {kind: sum(found) / len(found) for kind, found in hits.items()},
        "num_questions": {kind: len(found) for kind, found in hits.items()},
        "records": records,
    }
