"""What a model wrote, as questions and answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava_ds.datagen.kinds import Kind
from llava_ds.errors import DataError

_SEPARATOR = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)
_HEADING = re.compile(r"\A[*#\s]*(Question|Answer)[*\s]*:[*\s]*", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A question and its answer; the question of a detailed description is empty, for it is drawn later."""

    question: str
    answer: str


def parse_reply(kind: Kind, text: str) -> tuple[Pair, ...]:
    """The pairs of ``Question:\\n...\\n===\\nAnswer:\\n...\\n===\\n...``, or one without a question of plain text.

    Raises DataError that says what breaks the form.
    """
    text = text.strip()
    if not text:
        raise DataError("the reply is empty")
    if not kind.asks:
        return (Pair("", text),)
    sections = [section.strip() for section in _SEPARATOR.split(text)]
    if not sections[-1]:  # a last separator closes the reply
        sections.pop()
    bodies = [_body(section, "Answer" if number % 2 else "Question") for number, section in enumerate(sections)]
    if len(bodies) % 2:
        raise DataError("wrong form: a last question without an answer")
    return tuple(Pair(question, answer) for question, answer in zip(bodies[::2], bodies[1::2], strict=True))


def _body(section: str, wanted: str) -> str:
    heading = _HEADING.match(section)
    if heading is None:
        raise DataError(f"wrong form: expected '{wanted}:', found {section[:40]!r}")
    if heading[1].capitalize() != wanted:
        raise DataError(f"wrong form: expected '{wanted}:', found '{heading[1]}:'")
    body = section[heading.end() :].strip()
    if not body:
        raise DataError(f"wrong form: nothing follows '{wanted}:'")
    return body
