"""What a model wrote, as questions and answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava_ds.datagen.kinds import Kind
from llava_ds.errors import DataError

_SEPARATOR = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_HEADING = re.compile(r"\A[*#\s]*(Question|Answer)[*\s]*:[*\s]*", re.IGNORECASE)
_HEADING_INSIDE = re.compile(r"^[*#\s]*(?:question|answer)[*\s]*\d*[*\s]*:", re.IGNORECASE | re.MULTILINE)
_NOT_PLAIN = re.compile(
    r"```|\A[{\[]"  # code, JSON
    r"|^\s*(?:={3,}|#{1,6} .*|\*\*[^*\n]+\*\*:?)\s*$"  # lines that are a separator or a heading
    r"|\A[^\n]*:\s*$|\A(?:sure|certainly|absolutely|of course|okay|ok)[,.!]"  # words to whoever asked
    r"|\A(?:here(?:['\u2019]s| is) )?[*#]*(?:an? |the )?(?:\w+ ){0,2}description\b[^.:\n]*:",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Pair:
    """A question and its answer; the question of a detailed description is empty, for it is drawn later."""

    question: str
    answer: str


def without_thoughts(text: str) -> str:
    """What a model replies when it has thought, with line ends as in files."""
    return _THOUGHTS.sub("", text.replace("\r\n", "\n")).strip()


def parse_reply(kind: Kind, text: str) -> tuple[Pair, ...]:
    """The pairs of ``Question:\\n...\\n===\\nAnswer:\\n...\\n===\\n...``, or one without a question of plain text.

    What a reasoning model thinks before it answers (``<think>...</think>``) is no part of the reply.
    Raises DataError that says what breaks the form.
    """
    text = without_thoughts(text)
    if not text:
        raise DataError("the reply is empty")
    if not kind.asks:
        if found := _NOT_PLAIN.search(text):
            raise DataError(f"wrong form: expected plain text, found {found[0].strip()[:40]!r}")
        return (Pair("", _without_heading(text)),)
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
    return _without_heading(body)


def _without_heading(body: str) -> str:
    if found := _HEADING_INSIDE.search(body):
        raise DataError(f"wrong form: {found[0].strip()!r} inside a text; is a line === missing?")
    return body
