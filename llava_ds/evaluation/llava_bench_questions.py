"""LLaVA-Bench's questions to a model; tools/judge scores the answers."""

from __future__ import annotations

from pathlib import Path

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import DataError
from llava_ds.evaluation.question_rows import Row, read_id, read_rows
from llava_ds.evaluation.questions import Question, check_questions
from llava_ds.schema import Turn
from llava_ds.text.placement import place_images

MAX_NEW_TOKENS = 1024  # of the official code


def read_questions(path: Path, image_root: Path | None = None) -> list[Question]:
    """JSONL ``{question_id, image, text, category}``; images are under ``image_root``, by default the file's folder.

    Raises DataError that names the file and the line, or lists the first missing images and counts them all.
    """
    questions = [_parse(row, image_root or path.parent) for row in read_rows(path)]
    check_questions(questions, path, "Give the folder that holds them with --image-root.")
    return questions


def _parse(row: Row, image_root: Path) -> Question:
    record, where, id = row.record, row.where, read_id(row.record, row.where)
    wrong = [key for key in ("image", "text") if not isinstance(record.get(key), str)]
    if wrong:
        raise DataError(f"{where}: {', '.join(wrong)} must be text, got {record.get(wrong[0])!r:.80}")
    if record["text"].count(IMAGE_PLACEHOLDER) > 1:
        raise DataError(f"{where}: more than one '{IMAGE_PLACEHOLDER}'; a question has one image")
    turn = Turn("user", place_images(record["text"], 1))
    return Question(id, (turn,), (image_root / record["image"],), where, record)
