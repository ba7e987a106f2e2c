"""Two scores out of what a judge wrote.

Accepted is a first line of two numbers from 1 to 10 in the order of the answers (``8 9``, ``8, 9``, ``8/10 9/10``,
``8.5 and 9``), or named (``Assistant 1: 8, Assistant 2: 9``, also over two lines). What reads in two ways is refused.
"""

from __future__ import annotations

import re

from llava_ds.errors import DataError

MIN_SCORE, MAX_SCORE = 1.0, 10.0

_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
_OUT_OF_TEN = r"(\s*(?:/|out of)\s*10(?![0-9]|\.[0-9]))?"
_SCORE = _NUMBER + _OUT_OF_TEN
_BETWEEN = r"(?:\s*[,;|&]\s*(?:and\s+)?|\s+and\s+|\s+)"
_TITLE = r"(?:(?:the\s+)?(?:two\s+)?(?:scores?|ratings?)(?:\s+are)?\s*[:=]?\s*)?"
_PAIR = re.compile(rf"{_TITLE}{_SCORE}{_BETWEEN}{_SCORE}\.?", re.IGNORECASE)
_MARKUP = re.compile(r"[*_`#()\[\]\"]")


def parse_scores(text: str, role: str = "Assistant") -> tuple[float, float]:
    """The scores of the first and of the second answer; ``role`` is the word before their numbers.

    Raises DataError; its ``reason`` is one of a few, to count by.
    """
    lines = [line for line in (" ".join(_MARKUP.sub("", line).split()) for line in text.splitlines()) if line]
    if not lines:
        raise _refusal("empty", text)
    named = _named_scores(lines, role)
    if named is not None:
        return _in_range(named["1"], named["2"], text)
    found = _PAIR.fullmatch(lines[0])
    if found is None:
        raise _refusal(_why_not(lines[0]), text)
    first, first_of_ten, second, second_of_ten = found.groups()
    if bool(first_of_ten) != bool(second_of_ten):  # "8 9/10" is also eight and nine tenths
        raise _refusal("only one score out of ten", text)
    return _in_range(first, second, text)


def _named_scores(lines: list[str], role: str) -> dict[str, str] | None:
    """Scores by the answer's number where the first line, or the first two, name both answers."""
    one = re.compile(rf"{re.escape(role)}\s*([12])(?:'s)?(?:\s+score)?\s*[:=-]\s*{_SCORE}\.?", re.IGNORECASE)
    both = re.compile(rf"{_TITLE}({one.pattern}){_BETWEEN}({one.pattern})", re.IGNORECASE)
    for candidate in (lines[0], " ".join(lines[:2])):
        found = both.fullmatch(candidate)
        if found is not None:
            _, name, score, of_ten, _, other_name, other_score, other_of_ten = found.groups()
            if name == other_name or bool(of_ten) != bool(other_of_ten):
                return None
            return {name: score, other_name: other_score}
    return None


def _in_range(first: str, second: str, text: str) -> tuple[float, float]:
    scores = float(first), float(second)
    if not all(MIN_SCORE <= score <= MAX_SCORE for score in scores):
        raise _refusal("out of range", text)
    return scores


def _why_not(line: str) -> str:
    count = len(re.findall(_NUMBER, line))
    return {0: "no number", 1: "one number"}.get(count, "no plain pair of numbers")


def _refusal(reason: str, text: str) -> DataError:
    return DataError(
        f"no two scores from {MIN_SCORE:g} to {MAX_SCORE:g} in the judge's first line: {reason}: {text!r:.80}", reason
    )
