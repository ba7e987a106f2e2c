"""Questions that a model is asked: conversations with ids, and what is wrong with a list of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_ds.errors import DataError
from llava_ds.schema import Turn

_MAX_LISTED = 5


@dataclass(frozen=True)
class Question:
    """A conversation that ends in a user turn. ``record`` is what its file says of it, for its score."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]
    origin: str
    record: Mapping[str, Any]


def check_questions(questions: Sequence[Question], where: Path, advice: str) -> None:
    """Raises DataError that counts all missing images and ids that stand twice, and lists the first of each."""
    missing = [f"{one.origin}: {image}" for one in questions for image in one.images if not image.is_file()]
    counts = Counter(one.id for one in questions)
    repeated = [f"{one.origin}: id {one.id!r} stands {counts[one.id]} times" for one in questions if counts[one.id] > 1]
    problems = [_list("image file(s) are missing", missing, advice)] if missing else []
    problems += [_list("id(s) stand more than once", repeated, "Give every question its own.")] if repeated else []
    if problems:
        raise DataError("\n".join(f"{where}: {problem}" for problem in problems))


def _list(what: str, items: Sequence[str], advice: str) -> str:
    shown = "\n  ".join(items[:_MAX_LISTED])
    return f"{len(items)} {what}, the first:\n  {shown}\n  {advice}"


def hash_questions(questions: Sequence[Question]) -> str:
    """A hash of all that a model sees, but that of an image file its name and size stand for its pixels."""
    digest = hashlib.sha256()
    for one in questions:
        images = [(image.name, image.stat().st_size) for image in one.images]
        digest.update(json.dumps([one.id, [asdict(turn) for turn in one.turns], images]).encode())
    return digest.hexdigest()[:16]
