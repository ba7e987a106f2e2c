"""LLaVA-Bench (COCO, In-the-Wild): questions, references, contexts and answers, joined by question id.

Files are those of the LLaVA repository, JSONL: questions ``{question_id, image, text, category}``, references and
answers ``{question_id, text, ...}``, contexts by image ``{image, captions, instances: [{category, bbox}]}`` (COCO) or
``{image, caption}`` (In-the-Wild; a caption may be a list). The order of lines means nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_ds.errors import DataError
from llava_ds.evaluation.question_rows import Row, compare_ids, id_order, listed, read_rows, rows_by_id

Kind = Literal["coco", "in_the_wild"]


@dataclass(frozen=True)
class Question:
    """What a judge is told beside an answer; ``category`` is conv, detail or complex."""

    id: str
    category: str
    text: str
    context: str
    reference: str


@dataclass(frozen=True)
class Answers:
    """A model's answers by question id. ``name`` is the file's without its suffix, ``model`` what stands in it."""

    name: str
    model: str | None
    file: Path
    texts: Mapping[str, str]

    @property
    def num_empty(self) -> int:
        """Answers without a word; they are judged like others."""
        return sum(not text.strip() for text in self.texts.values())


@dataclass(frozen=True)
class Bench:
    """Questions by ascending id, one or more models' answers to all of them, and the files' hashes by path."""

    kind: Kind
    questions: tuple[Question, ...]
    answers: tuple[Answers, ...]
    sha256: Mapping[str, str]


def read_bench(questions: Path, references: Path, context: Path, answers: Sequence[Path]) -> Bench:
    """All files, joined. Raises one DataError that lists all ids that are missing, unknown or there twice, by file."""
    problems: list[str] = []
    asked = rows_by_id(read_rows(questions), problems)
    reference_rows = rows_by_id(read_rows(references), problems)
    kind, contexts = _read_contexts(read_rows(context), context, problems)
    answer_rows = [rows_by_id(read_rows(path), problems) for path in answers]
    problems += _check_texts(asked, ("image", "text", "category"))
    problems += _check_texts(reference_rows, ("text",))
    for rows in answer_rows:
        problems += _check_texts(rows, ("text",), may_be_empty=True)
    for path, rows in zip([references, *answers], [reference_rows, *answer_rows], strict=True):
        problems += [*compare_ids(asked, rows, questions, path), *_compare_content(asked, rows)]
    images = dict.fromkeys(str(row.record.get("image")) for row in asked.values())
    without = [image for image in images if image not in contexts]
    if without:
        problems.append(f"{context} has no context for {len(without)} image(s) of {questions}: {listed(without)}")
    names = [path.stem for path in answers]
    if len(set(names)) < len(names):
        problems.append(f"--answers: the files' names are models' names in tables, so all must differ, got {names}")
    if problems:
        raise DataError(
            "the files of LLaVA-Bench do not fit each other:\n  " + "\n  ".join(problems)
            + "\n  Every question needs exactly one reference and one answer of each model; nothing was asked or paid."
        )
    return Bench(
        kind,
        tuple(_question(asked[id], reference_rows[id], contexts) for id in sorted(asked, key=id_order)),
        tuple(_answers(path, rows) for path, rows in zip(answers, answer_rows, strict=True)),
        {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (questions, references, context, *answers)
        },
    )


def _compare_content(asked: Mapping[str, Row], found: Mapping[str, Row]) -> Iterator[str]:
    """Ids are small numbers, so another benchmark has them, too; what a row says of its question is compared."""
    for id, row in found.items():
        question = asked[id].record if id in asked else {}
        category, prompt = row.record.get("category"), row.record.get("prompt")
        if category and question and category != question.get("category"):
            yield f"{row.where}: category {category!r}, but {asked[id].where} says {question.get('category')!r}"
        # A prompt may have instructions around the question.
        if isinstance(prompt, str) and _words(question.get("text")) not in _words(prompt):
            yield f"{row.where}: answers {prompt!r:.80}, but {asked[id].where} asks {question.get('text')!r:.80}"


def _words(text: Any) -> str:
    return " ".join(str(text or "").split())


def _check_texts(rows: Mapping[str, Row], keys: Sequence[str], may_be_empty: bool = False) -> Iterator[str]:
    for row in rows.values():
        for key in keys:
            value = row.record.get(key)
            if not isinstance(value, str) or not (may_be_empty or value.strip()):
                yield f"{row.where}: {key!r} must be text{'' if may_be_empty else ' with words'}, got {value!r:.80}"


def _read_contexts(rows: Sequence[Row], path: Path, problems: list[str]) -> tuple[Kind, dict[str, str]]:
    """Contexts by image as the official scripts write them: captions a line each, then COCO's objects."""
    kinds: Counter[Kind] = Counter()
    contexts: dict[str, str] = {}
    for row in rows:
        record = row.record
        kind: Kind = "coco" if "instances" in record else "in_the_wild"
        image, text = record.get("image"), _context_text(record)
        if not isinstance(image, str) or text is None:
            problems.append(f"{row.where}: expected image, captions, instances, or image, caption, got {record!r:.80}")
            continue
        if image in contexts:
            problems.append(f"{row.where}: image {image} stands there a second time")
        kinds[kind] += 1
        contexts[image] = text
    if len(kinds) > 1:
        problems.append(f"{path} mixes contexts of COCO (with 'instances') and of In-the-Wild: {dict(kinds)}")
    return next(iter(kinds), "coco"), contexts


def _context_text(record: Mapping[str, Any]) -> str | None:
    """None for a record that has no context."""
    captions = record.get("captions" if "instances" in record else "caption")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        return None
    if "instances" not in record:
        return "\n".join(captions)
    try:
        boxes = "\n".join(f"{instance['category']}: {instance['bbox']}" for instance in record["instances"])
    except (KeyError, TypeError):
        return None
    return "\n".join(captions) + f"\n\n{boxes}"


def _question(row: Row, reference: Row, contexts: Mapping[str, str]) -> Question:
    record = row.record
    return Question(
        str(record["question_id"]), record["category"], record["text"], contexts[record["image"]],
        reference.record["text"],
    )


def _answers(path: Path, rows: Mapping[str, Row]) -> Answers:
    models = sorted({str(row.record.get("model") or row.record.get("model_id") or "") for row in rows.values()} - {""})
    if len(models) > 1:
        raise DataError(f"{path}: answers of several models, {listed(models)}; give each its own file")
    return Answers(path.stem, models[0] if models else None, path, {id: row.record["text"] for id, row in rows.items()})
