"""Answers to ScienceQA problems in a file: ours, the official code's answers, or its results.

| form | |
|---|---|
| ours, JSONL | ``{"id": pid, "text": answer, "prompt"?: ..., "model"?: ...}`` a line |
| official answers, JSONL | ``{"question_id": pid, "text": answer, "prompt": ..., ...}`` a line |
| official results, JSON | ``{"outputs": {pid: answer}, ...}`` |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ds.errors import DataError
from llava_ds.evaluation.prediction_file import parse_answer

_WANTED = (
    'give JSONL with {"id" or "question_id", "text"} a line, or the official results {"outputs": {id: text}} as JSON'
)


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one problem; ``prompt`` is None where the file does not say what was asked."""

    text: str
    prompt: str | None = None
    place: str = field(default="", compare=False)


def read_predictions(file: Path) -> dict[str, Prediction]:
    """The predictions of a file by the problem's id, in the order of the file.

    Raises DataError that names file and line: for what is none of the three forms, an id that stands twice, no records.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {_WANTED}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}); {_WANTED}") from error
    return parse_predictions(text, file)


def parse_predictions(text: str, file: Path) -> dict[str, Prediction]:
    """The same of a text that is, or will be, in ``file``."""
    predictions: dict[str, Prediction] = {}
    outputs = _read_outputs(text, file)
    for pid, prediction in _read_lines(text, file) if outputs is None else outputs:
        if pid in predictions:
            places = f"{prediction.place}: id {pid!r} stands at {predictions[pid].place} too"
            raise DataError(f"{places}; keep one of the two")
        predictions[pid] = prediction
    if not predictions:
        raise DataError(f"{file}: holds no predictions; {_WANTED}")
    return predictions


def _read_outputs(text: str, file: Path) -> list[tuple[str, Prediction]] | None:
    """The records of an official result file, None where it is another."""
    try:
        # As pairs, so that an id that stands twice is seen.
        parsed = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        first, _, rest = text.partition("\n")
        if first.strip() == "{" and rest:  # an object over several lines that is cut off
            raise DataError(f"{file}: not valid JSON: {error}; {_WANTED}") from error
        return None  # several lines of JSON, or none: what is wrong is said by line
    outputs = next((value for key, value in parsed if key == "outputs"), None) if isinstance(parsed, _Pairs) else None
    if not isinstance(outputs, _Pairs):
        return None
    return [_parse({"id": pid, "text": answer}, f"{file} outputs[{pid!r}]") for pid, answer in outputs]


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON object."""


def _read_lines(text: str, file: Path) -> Iterator[tuple[str, Prediction]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not valid JSON: {error}; {_WANTED}") from error
        yield _parse(record, place)


def _parse(record: Any, place: str) -> tuple[str, Prediction]:
    try:
        pid, text = parse_answer(record, place)
    except DataError as error:
        raise DataError(f"{error}; {_WANTED}") from error
    prompt = record.get("prompt")
    return pid, Prediction(text, prompt if isinstance(prompt, str) else None, place)


def format_predictions(records: Iterable[dict[str, Any]]) -> str:
    """Records ``{"id", "text", ...}`` as JSONL."""
    return "".join(json.dumps(record) + "\n" for record in records)
