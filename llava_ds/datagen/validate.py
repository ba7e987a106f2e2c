"""What makes a well-formed reply unfit to train on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from llava_ds.datagen.kinds import Kind
from llava_ds.datagen.reply import Pair, parse_reply
from llava_ds.errors import DataError


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE | re.MULTILINE)


_SAYS = (
    r"(?:say|state|mention|describe|indicate|suggest|note|tell|specif|refer|list|include|provide|do not|does not|don't"
    r"|doesn't)"
)
_GIVEN = r"(?:given|provided|above|supplied|available)"
_SHOWN = r"(?:captions?|descriptions?|sentences?|information|context|text|data|details?|lists?|annotations?|input)"

FAULTS = {
    "holds a placeholder or special token": _any(
        r"<image>", r"</?s>", r"<unk>", r"<pad>", r"<\|[^|>\n]*\|>", r"\[/?INST\]", r"<</?SYS>>",
        r"^\s*(?:#{3,}\s*)?(?:human|assistant|user|system)\s*:",
    ),
    "gives coordinates": _any(
        r"(?<![\d$€£.])[01]?\.\d{3}(?!\d)",  # as the model was shown them
        r"[\[(]\s*-?\d*\.\d+\s*,\s*-?\d*\.?\d+",  # rounded, in pairs
        r"\[\s*-?\d+(?:\.\d+)?\s*(?:,\s*-?\d+(?:\.\d+)?\s*)+\]",
    ),
    "speaks of captions or boxes": _any(
        r"\b(?:the|these|those|this|your|all|each|both|image|five|first|second|third|another|one|" + _GIVEN
        + r") captions?\b(?! (?:on|of|at|under|below|above|beneath) )",
        rf"\bcaptions? {_SAYS}",
        r"\b(?:in|from|per|by|to|with) (?:the )?captions?\b(?! (?:on|of|at|under|below|above|beneath) )",
        r"\bbounding[- ]box", r"\b(?:detection|object) box(?:es)?\b", r"\bbox(?:es)? coordinates?\b",
        r"\b(?:the|its|their|these|those|given|provided|normali[sz]ed|[xy]|pixel|image|exact) coordinates?\b",
        r"\bcoordinates? (?:of|for|indicate|suggest|show|are|is)\b", r"\bcoordinates?\s*[\[(:]",
        r"\bobject (?:list|detections?|annotations?)\b", r"\b(?:list of|detected) objects\b", r"\bannotations?\b",
    ),
    "speaks of its source": _any(
        rf"\b(?:the|this|these|your|any|on|from|in|by|with) {_GIVEN} {_SHOWN}\b",
        r"\b(?:information|details?|context|data) (?:given|provided)\b",
        r"\b(?:in|from|on|by|to|per) (?:the|this|these|your|both|all) (?:image )?(?:descriptions?|sentences)\b"
        r"(?! (?:on|of) )",
        rf"\b(?:the|these|this|your) (?:image )?(?:descriptions?|sentences) {_SAYS}",
        r"\bas (?:provided|given above|described above|mentioned above|stated above)\b",
        r"\b(?:described|mentioned|stated|specified|provided|listed) in the (?:image )?(?:description|text|list|data)",
        r"\bnot (?:explicitly )?(?:mentioned|specified|stated|provided)\b",
        r"\b(?:they|it|he|she|which) (?:is|are) (?:also )?described as\b",
        r"\b(?:terms?|words?)\b[^.]{0,80}\bused\b[^.]{0,40}\bto describe\b",
    ),
    "speaks as a language model": _any(
        r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|text-based)\b", r"\blanguage model\b",
        r"\bI(?:'m| am) (?:sorry|unable|not able|afraid)\b",
        r"\bI (?:cannot|can't|can not|do not|don't) (?:actually |directly )?(?:see|view|access|assist|provide|help)\b",
        r"\b(?:I )?apologi[sz]e\b",
    ),
}
"""Words that no question and no answer may hold, by the reason they are refused for."""

_RUN, _MOST_RUNS = 4, 4
"""An answer in which as many words in a row come as often is a model that has lost its way."""


def find_fault(kind: Kind, text: str, finish_reason: str) -> str | None:
    """Why a reply is refused, as ``reason: what was found``; None when it is not."""
    if finish_reason == "length":
        return "cut off: it reached max_tokens"
    if finish_reason == "content_filter":
        return "cut off: by the endpoint's content filter"
    try:
        pairs = parse_reply(kind, text)
    except DataError as error:
        return str(error)
    return find_fault_in_pairs(kind, pairs)


def find_fault_in_pairs(kind: Kind, pairs: Sequence[Pair]) -> str | None:
    """The same of a reply that has the right form."""
    fewest, most = kind.num_pairs
    if not fewest <= len(pairs) <= most:
        return f"wrong number of questions: {len(pairs)}, expected {fewest} to {most}"
    for pair in pairs:
        for text in (pair.question, pair.answer):
            for reason, pattern in FAULTS.items():
                if found := pattern.search(text):
                    return f"{reason}: {found[0].strip()!r}"
    return _find_length(kind, pairs) or _find_repetition(kind, pairs)


def _find_length(kind: Kind, pairs: Sequence[Pair]) -> str | None:
    for pair in pairs:
        for what, text, (fewest, most) in (
            ("question", pair.question, kind.question_words),
            ("answer", pair.answer, kind.answer_words),
        ):
            num_words = len(text.split())
            if num_words < fewest:
                return f"{what} too short: {num_words} words, at least {fewest} expected"
            if num_words > most:
                return f"{what} too long: {num_words} words, at most {most} expected"
    return None


def _find_repetition(kind: Kind, pairs: Sequence[Pair]) -> str | None:
    for pair in pairs:
        words = normalise_text(pair.answer).split()
        runs = Counter(zip(*(words[start:] for start in range(_RUN)), strict=False)).most_common(1)
        if runs and runs[0][1] >= _MOST_RUNS:
            return f"goes round in circles: {' '.join(runs[0][0])!r} {runs[0][1]} times"
    questions = Counter(normalise_text(pair.question) for pair in pairs if kind.asks)
    twice = next((question for question, count in questions.items() if count > 1), None)
    return f"a question twice: {twice[:60]!r}" if twice is not None else None


def normalise_text(text: str) -> str:
    """Lower-case words without punctuation, for comparing."""
    return " ".join(re.findall(r"\w+", text.casefold()))
