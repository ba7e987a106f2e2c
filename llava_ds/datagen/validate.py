"""What makes a well-formed reply unfit to train on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from llava_ds.datagen.kinds import Kind
from llava_ds.datagen.records import Instance
from llava_ds.datagen.reply import Pair, parse_reply, without_thoughts
from llava_ds.errors import DataError


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE | re.MULTILINE)


_SAYS = (
    r"(?:say|state|mention|describe|indicate|suggest|note|tell|specif|refer|list|include|provide|do not|does not|don't"
    r"|doesn't)"
)
_GIVEN = r"(?:given|provided|above|supplied|available)"
_SHOWN = r"(?:captions?|descriptions?|sentences?|information|context|text|data|details?|lists?|annotations?|input)"
_BY = r"(?:according to|(?:based|going|judging) (?:on|by|from))"
_ALONE = r"(?=\s*(?:[,.;:)]|$))"  # boxes or a list in the picture would be told apart here: "stacked by the door"
_FRACTION = r"(?:0?\.\d+|1\.0+)(?!\d|\.\d)"

SPECIAL_TOKEN = "holds a placeholder or special token"
FAULTS = {
    SPECIAL_TOKEN: _any(
        r"<image>", r"</?s>", r"<unk>", r"<pad>", r"<\|", r"\[/?INST\b", r"<</?SYS>>", r"</?think>",
        r"</?(?:start_of_turn|end_of_turn|im_start|im_end|bos|eos)>",
        r"^\s*(?:#{3,}\s*)?(?:human|assistant|user|system)\s*:",
    ),
    "gives coordinates": _any(
        rf"(?<![\w.$€£]){_FRACTION}(?:\s*[,;]\s*(?:\w+\s*[=:]\s*)?{_FRACTION})+",
        rf"\b[xy][12]?\s*[=:]\s*{_FRACTION}", rf"(?<![\w.]){_FRACTION} of (?:the|its) (?:\w+ )?(?:width|height)\b",
        r"\[\s*-?\d+(?:\.\d+)?\s*(?:,\s*-?\d+(?:\.\d+)?\s*)+\]", r"\(\s*\d{3}\s*(?:,\s*\d{3}\s*)+\)",
    ),
    "speaks of captions or boxes": _any(
        r"\b(?:the|these|those|this|your|all|each|both|image|five|first|second|third|another|one|" + _GIVEN
        + r") captions?\b(?! (?:on|of|at|under|below|above|beneath) )",
        rf"\bcaptions? {_SAYS}",
        r"\b(?:in|from|per|by|to|with) (?:the )?captions?\b(?! (?:on|of|at|under|below|above|beneath) )",
        r"\bcaptions? #?(?:\d|one\b|two\b|three\b|four\b|five\b)",
        r"\bbounding[- ](?:box|rectangle)", r"\bbbox", r"\b(?:detection|object) box(?:es)?\b",
        r"\bbox(?:es)? coordinates?\b", rf"\b{_BY} (?:the |these |those )?box(?:es)?{_ALONE}",
        r"\bbox(?:es)? (?:show|indicate|suggest|tell|say|imply|confirm)s? (?:that|where|how|us)\b",
        r"\b(?:the|its|their|these|those|given|provided|normali[sz]ed|[xy]|pixel|image|object|exact) coordinates?\b",
        rf"\b(?:{_BY}|by|from|per|using) coordinates?\b",
        r"\bcoordinates? (?:of|for|indicate|suggest|show|are|is)\b", r"\bcoordinates?\s*[\[(:]",
        r"\bobject (?:list|detections?|annotations?)\b", r"\b(?:list of|detected) objects\b", r"\bannotations?\b",
    ),
    "speaks of its source": _any(
        rf"\b(?:the|this|these|your|any|on|from|in|by|with) {_GIVEN} {_SHOWN}\b",
        rf"\b{_SHOWN} (?:given|provided)\b(?! (?:by|to|for|at|on|with|out)\b)",
        rf"\b{_BY} (?:the|this|your) (?:list|numbers){_ALONE}", r"\bthe list (?:mention|indicate|suggest|include)s?\b",
        r"\bthe (?:list|numbers) (?:show|say|tell|indicate|suggest)s? that\b",
        r"\b(?:in|from|on|by|to|per) (?:the|this|these|your|both|all) (?:image )?(?:descriptions?|sentences)\b"
        r"(?! (?:on|of) )",
        rf"\b(?:the|these|this|your) (?:image )?(?:descriptions?|sentences) {_SAYS}",
        r"\bas (?:provided|given above|described above|mentioned above|stated above)\b",
        r"\b(?:described|mentioned|stated|specified|provided|listed) in the (?:image )?(?:description|text|list|data)",
        r"\b(?:not|isn't|aren't|wasn't|weren't) (?:explicitly )?(?:mentioned|specified|stated|provided)\b",
        r"\b(?:they|it|he|she|which) (?:is|are) (?:also )?described as\b",
        r"\b(?:terms?|words?)\b[^.]{0,80}\bused\b[^.]{0,40}\bto describe\b",
    ),
    "speaks as a language model": _any(
        r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|text-based)\b", r"\blanguage model\b",
        r"\bI(?:'m| am) (?:sorry|unable|not able|afraid|(?:just |only )?an? (?:AI|artificial|virtual assistant))\b",
        r"\bI (?:do not|don't|cannot|can't) have (?:the ability|(?:direct |visual )?access)\b",
        r"\bI (?:cannot|can't|can not|do not|don't) (?:actually |directly )?(?:see|view|access|assist|provide|help)\b",
        r"\b(?:I )?apologi[sz]e\b", r"\blet me know (?:if|whether|in case)\b", r"\bI hope (?:this|that|it) helps\b",
    ),
}
"""Words that no question and no answer may hold, by the reason they are refused for."""

_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Half a surrogate pair, which no file can hold, and control characters but tab and newline."""

_NUMBER = re.compile(r"(?<![\w.$€£])0?\.\d{2,}(?!\d|\s?%)")

_RUN, _MOST_RUNS, _WORDS_A_RUN = 4, 4, 100
"""A model has lost its way when four words in a row come more than four times, and once more for each hundred words of
the answer: a description may say of several things that they are on the left side."""


def find_fault(kind: Kind, text: str, finish_reason: str, instances: Iterable[Instance]) -> str | None:
    """Why a reply is refused, as ``reason: what was found``; None when it is not. ``instances``: the image's."""
    if finish_reason == "length":
        return "cut off: it reached max_tokens"
    if finish_reason == "content_filter":
        return "cut off: by the endpoint's content filter"
    if found := _NO_TEXT.search(without_thoughts(text)):
        return f"holds a character that is no text: {found[0]!r}"
    try:
        pairs = parse_reply(kind, text)
    except DataError as error:
        return str(error)
    return find_fault_in_pairs(kind, pairs, instances)


def find_fault_in_pairs(kind: Kind, pairs: Sequence[Pair], instances: Iterable[Instance] = ()) -> str | None:
    """The same of a reply that has the right form."""
    fewest, most = kind.num_pairs
    if not fewest <= len(pairs) <= most:
        return f"wrong number of questions: {len(pairs)}, expected {fewest} to {most}"
    edges = {round(edge, 3) for instance in instances for edge in instance.box if kind.sees_boxes}
    for pair in pairs:
        for text in (pair.question, pair.answer):
            text = text.replace("\u2019", "'")
            for reason, pattern in FAULTS.items():
                if found := pattern.search(text):
                    return f"{reason}: {found[0].strip()!r}"
            if number := next((number for number in _NUMBER.findall(text) if _is_edge(number, edges)), None):
                return f"gives coordinates: {number!r} is the edge of a box"
    return _find_length(kind, pairs) or _find_repetition(kind, pairs)


def _is_edge(number: str, edges: Iterable[float]) -> bool:
    """Whether a number of two or more decimals is an edge as the model was shown it, or that rounded."""
    rounding = 0.5 / 10 ** len(number.partition(".")[2]) + 1e-9
    return 0 < float(number) and any(abs(float(number) - edge) <= rounding for edge in edges if 0 < edge < 1)


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
        if runs and runs[0][1] > _MOST_RUNS + len(words) // _WORDS_A_RUN:
            return f"goes round in circles: {' '.join(runs[0][0])!r} {runs[0][1]} times"
    questions = Counter(normalise_text(pair.question) for pair in pairs if kind.asks)
    twice = next((question for question, count in questions.items() if count > 1), None)
    return f"a question twice: {twice[:60]!r}" if twice is not None else None


def normalise_text(text: str) -> str:
    """Lower-case words without punctuation, for comparing."""
    return " ".join(re.findall(r"\w+", text.casefold()))
