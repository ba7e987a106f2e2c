"""Exact-match accuracy on short questions about single images, by kind of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.data.sources.llava_json import read_json_list
from llava_ds.errors import DataError
from llava_ds.inference.session import Sampling, Session
from llava_ds.schema import Turn
from llava_ds.text.placement import place_images

_KEYS = ("id", "image", "kind", "question", "answer")


def read_questions(path: Path, image_root: Path | None = None) -> list[dict[str, Any]]:
    """Records ``{id, image, kind, question, answer}``; images are under ``image_root``, by default the file's folder.

    Raises DataError that names the file and the record, or lists the first missing images and counts them all.
    """
    records = read_json_list(path, f"a JSON list of questions {{{', '.join(_KEYS)}}}")
    for number, record in enumerate(records):
        _check_question(record, f"{path}[{number}]")
    files = [(image_root or path.parent) / record["image"] for record in records]
    missing = [f"{path.name}[{number}]: {file}" for number, file in enumerate(files) if not file.is_file()]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} image file(s) are missing, the first:\n  "
            + "\n  ".join(missing[:5])
            + "\n  Fix the paths, or give the folder that they start from with --image-root."
        )
    return records


def _check_question(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {', '.join(_KEYS)}, got {type(record).__name__}")
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}; every question needs {', '.join(_KEYS)}")
    wrong = [key for key in _KEYS[1:] if not isinstance(record[key], str)]
    if wrong:
        raise DataError(f"{where} id={record['id']!r}: {', '.join(wrong)} must be text, got {record[wrong[0]]!r:.80}")
    if record["question"].count(IMAGE_PLACEHOLDER) > 1:
        raise DataError(f"{where} id={record['id']!r}: more than one '{IMAGE_PLACEHOLDER}'; a question has one image")


def evaluate(
    session: Session, questions: Sequence[dict[str, Any]], image_root: Path, batch_size: int = 64
) -> dict[str, Any]:
    """Asks every question and scores whole answers, ignoring case.

    Returns ``accuracy`` and ``num_questions`` by kind, and ``records`` with the answers.
    """
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        conversations = [[Turn("user", place_images(record["question"], 1))] for record in chunk]
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
