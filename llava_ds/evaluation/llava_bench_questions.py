"""LLaVA-Bench's questions to a model; tools/judge scores the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.data.sources.jsonl import parse_line
from llava_ds.errors import DataError
from llava_ds.evaluation.questions import Question, check_questions
from llava_ds.schema import Turn
from llava_ds.text.placement import place_images

MAX_NEW_TOKENS = 1024  # of the official code


def read_questions(path: Path, image_root: Path | None = None) -> list[Question]:
    """JSONL ``{question_id, image, text, category}``; images are under ``image_root``, by default the file's folder.

    Raises DataError that names the file and the line, or lists the first missing images and counts them all.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give LLaVA-Bench's questions, JSONL {{question_id, image, text}}")
    lines = enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    questions = [
        _parse(parse_line(line, f"{path}:{number}"), f"{path}:{number}", image_root or path.parent)
        for number, line in lines
        if line.strip()
    ]
    if not questions:
        raise DataError(f"{path}: holds no questions")
    check_questions(questions, path, "Give the folder that holds them with --image-root.")
    return questions


def _parse(record: Any, where: str, image_root: Path) -> Question:
    if not isinstance(record, dict) or not isinstance(record.get("question_id"), int | str):
        raise DataError(f"{where}: expected an object with question_id, image and text, got {record!r:.80}")
    wrong = [key for key in ("image", "text") if not isinstance(record.get(key), str)]
    if wrong:
        raise DataError(f"{where}: {', '.join(wrong)} must be text, got {record.get(wrong[0])!r:.80}")
    if record["text"].count(IMAGE_PLACEHOLDER) > 1:
        raise DataError(f"{where}: more than one '{IMAGE_PLACEHOLDER}'; a question has one image")
    turn = Turn("user", place_images(record["text"], 1))
    return Question(str(record["question_id"]), (turn,), (image_root / record["image"],), where, record)
