r"""Which choice an answer to a multiple-choice question states.

``(A)``, ``A)``, ``A.``, ``**A**``, ``“A”``, ``\(A\)``, ``\boxed{\text{A}}`` are letters as ``A`` is, in either case; a
bare ``A`` or ``I`` before another word is an article or a pronoun. Then, in this order:

1. An answer that is one choice's text is that choice (case, a leading article and punctuation aside).
2. Letters are *stated* by "the answer is B", "Answer: B", "option B is correct", "I choose B", and by a label that
   begins the answer ("B", "B. a stone", "(B) because ..."), unless labels of several choices follow: then it lists the
   options. What is denied or asked is not stated ("I don't think the answer is B", "'The answer is B' is incorrect").
   All stated letters must be the same. If they are not, the last statement counts when it says that it concludes
   ("so / therefore / thus / hence / finally, the answer is", "the final answer is") and no other conclusion differs.
3. Where no letter is stated, one choice's text may be: "the answer is a stone".
4. An answer that begins with one choice's text and a reason ("a stone because ...") states that choice, too; alone
   only where nothing else speaks of the answer.

Everything else has no answer, for a reason of ``REASONS``. A label beside another choice's text ("A. a stone" where
that is B) or another letter ("A. B") counts as several letters. A letter that is only mentioned counts as none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from llava_ds.data.sources.scienceqa import LETTERS

NO_LETTER, SEVERAL_LETTERS, OUT_OF_RANGE = "no letter", "several letters", "letter out of range"
MISSING = "missing"
REASONS = (NO_LETTER, SEVERAL_LETTERS, OUT_OF_RANGE, MISSING)

MOST_CHOICES = 5
"""Of a ScienceQA problem: what the letters are where the choices are not known."""


@dataclass(frozen=True)
class Answer:
    """``index`` of the choice; -1 where there is none, and then ``reason`` is one of ``REASONS``."""

    index: int
    reason: str | None = None


@dataclass(frozen=True)
class _Statement:
    start: int
    choices: set[int]  # more than one where it names several
    concludes: bool = False


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


_SPEAKER = _pattern(r"[#\s]*(?:assistant|gpt)\s*:")
_STOP = _pattern(r"(?:(?:</s>|<\|(?:im_end|endoftext|eot_id)\|>|###)\s*){1,9}$")
_QUOTES = str.maketrans("‘’“”", "''\"\"")
_TEX_TEXT = re.compile(r"\\(?:text|mathbf|mathrm|textbf)\{([^{}]*)\}")
_TEX_DELIMITER = re.compile(r"\\[()]")

_LETTER = _pattern(r"[\s(\[{\"'*_$]*(?<![a-z0-9])(?P<letter>[a-z])(?![a-z0-9])(?P<close>[)\]}\"'*_$]*)")
_NO_WORDS = frozenset(LETTERS) - set("AI")
_BRACKETED = _pattern(r"[(\[{*][a-z][)\]}*]")
# What may follow a letter, but no article: the end, punctuation, a reason.
_END = _pattern(r"\s*$|[ \t]*\n|[.,;:!]+(?=[\s)\]}\"'*_]|$)|\s+[-–—]\s|,?\s+(?:because|since|as)\b")
_JOIN = _pattern(r"\s*(?P<word>(?:,\s*)?\b(?:and|or)\b|/|&|,)\s*(?=[(\[{\"'*]*[a-z]\b(?!'))")

_KIND = r"(?:correct|right|best|final)"
_SAYS = (
    r"(?:answer|option|choice)\b[*_\"']*(?:\s+(?:to|for)\s+[^.!?\n:]{0,60}?)?"
    r"\s*(?:(?:is|would\s+be|must\s+be|should\s+be|will\s+be|has\s+to\s+be)\b|[:=])[\s:*_]*"
    rf"(?:(?:the|{_KIND}|definitely|clearly|most|likely|probably|simply|therefore|option|choice|letter|answer)\b[\s:]+)*"
)
_CHOOSES = r"I(?:'d|'ll|\s+would|\s+will)?\s+(?:choose|pick|select|go\s+with)\s+(?:(?:option|choice|letter)\s+)?"
_CUE = _pattern(rf"\b(?:{_SAYS}|{_CHOOSES})|\\boxed(?={{)")
_IS_CORRECT = _pattern(
    r"(?:^|[.!?\n:][ \t]*|\b(?:option|choice|answer|so|thus|therefore|hence),?\s+)"
    r"[(\[*]*(?P<letter>[a-z])[)\]*]*\s+is\s+"
    rf"(?:definitely\s+|clearly\s+)?(?:correct\b|(?:the\s+){_KIND}\s+(?:answer|option|choice)\b|the\s+answer\b)(?!\s*\?)"
)
_LEAD = _pattern(r"\s*(?:(?:it\s+is|it's|option|choice|letter|answer)\s+(?=\W*[a-z]\W*$))?")
_OPTION = re.compile(
    r"[(\[](?P<bracketed>[A-Za-z])[)\]]|^[ \t]*(?P<first>[A-Za-z])(?:[.):](?=\s)|[ \t]*$)|\b(?P<inner>[A-Z])[.):]\s",
    re.MULTILINE,
)

_FILLER = rf"(?:to|think|believe|says?|said|sure|certain|knows?|means?|that|is|the|an?|my|{_KIND})"
_DENIED_BEFORE = _pattern(
    r"(?:n't|\b(?:not|never|cannot|if|whether|doubt|unlikely|wrong|incorrect|false|untrue|myth|nobody|no\s+one|other|"
    rf"another))(?:\s+{_FILLER})*\s+$"
)
_DENIAL = r"\b(?:is|was|would\s+be|can)\s*(?:not\b|n't\b|wrong\b|incorrect\b|false\b)"
_DENIED_AFTER = _pattern(rf"[\W_]*{_DENIAL}")
_CONCLUDES = _pattern(
    rf"(?:\b(?:so|therefore|thus|hence|finally|in\s+conclusion),?\s+(?:(?:the|my)\s+)?|\bfinal\s+)(?:{_KIND}\s+)*$"
)

_CHOICE_END = _pattern(rf"[.!?\"')*]*(?:\s*$|[ \t]*\n|,?\s+(?:because|since)\b)|[.!;][\"')*]*\s(?!\s*{_DENIAL})")
_WHOLE_END = _pattern(r"[.!?\"')*\s]*$")
_REASON = _pattern(r",?\s+(?:because|since)\b")
_BARE = _pattern(r"[.:,;)\-–—\s]*[(\[\"'*]*(?P<letter>[a-z])[)\]\"'*.]*\s*$")
_NO_TEXT = _pattern("[a-z]?")  # a choice that is a letter cannot be told from the name of one
_OFFICIAL = re.compile(r"The answer is ([A-Z]).")


def extract_answer(text: str, choices: Sequence[str] | None = None) -> Answer:
    """The choice that ``text`` states by the rule above. Without ``choices``, letters A to E are taken for choices."""
    text = _normalise(text).strip()
    text = _STOP.sub("", _SPEAKER.sub("", text, count=1) if _SPEAKER.match(text) else text).strip()
    choices = [_normalise(choice) for choice in choices or ()]
    whole = _choice_at(text, choices, _WHOLE_END)
    if whole is not None:
        return Answer(whole)
    num_choices = len(choices) or MOST_CHOICES
    statements = _state_letters(text, choices, num_choices) or _state_texts(text, choices)
    begun = _choice_at(text, choices, _REASON)
    if begun is not None and (statements or not _CUE.search(text)):
        statements = [_Statement(0, {begun}), *statements]
    return _decide(statements, num_choices)


def _normalise(text: str) -> str:
    """One way to write quotes, and letters that TeX sets."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    return _TEX_DELIMITER.sub("$", _TEX_TEXT.sub(r"\1", text))


def _decide(statements: Sequence[_Statement], num_choices: int) -> Answer:
    stated = {choice for statement in statements for choice in statement.choices}
    if len(stated) > 1 and statements[-1].concludes:
        stated = {choice for statement in statements if statement.concludes for choice in statement.choices}
    if len(stated) != 1:
        return Answer(-1, SEVERAL_LETTERS if stated else NO_LETTER)
    (index,) = stated
    return Answer(index) if index < num_choices else Answer(-1, OUT_OF_RANGE)


def _state_letters(text: str, choices: Sequence[str], num_choices: int) -> list[_Statement]:
    """In the order of the text."""
    statements = []
    for cue in _not_denied(_CUE, text):
        letters, end = _letters_at(text, cue.end())
        named = _choice_after(text, cue.end(), choices) if letters else None
        if named is not None:
            letters = {named}  # no letter: "the answer is T. rex"
        if letters and not _DENIED_AFTER.match(text, end):
            letters = letters | _text_beside(text, end, letters, choices)
            statements.append(_Statement(cue.start(), letters, _concludes(text, cue)))
    for found in _not_denied(_IS_CORRECT, text):
        statements.append(_Statement(found.start(), {_index(found["letter"])}))
    label = _label(text, choices)
    listed = label | _labels_of_choices(text, choices, num_choices) if label else set()
    if label and (len(listed) == len(label) or not statements):
        statements.append(_Statement(0, listed))
    return sorted(statements, key=lambda statement: statement.start)


def _state_texts(text: str, choices: Sequence[str]) -> list[_Statement]:
    found = [(cue, _choice_after(text, cue.end(), choices)) for cue in _not_denied(_CUE, text)]
    return [_Statement(cue.start(), {choice}, _concludes(text, cue)) for cue, choice in found if choice is not None]


def _not_denied(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    return [found for found in pattern.finditer(text) if not _DENIED_BEFORE.search(text, *_before(found))]


def _concludes(text: str, cue: re.Match[str]) -> bool:
    return bool(_CONCLUDES.search(text, *_before(cue)))


def _before(cue: re.Match[str]) -> tuple[int, int]:
    """Where the words stand that say whether it is meant."""
    return max(0, cue.start() - 80), cue.start()


def _label(text: str, choices: Sequence[str]) -> set[int]:
    """The letters that begin an answer, with what another choice's text beside them says."""
    lead = _LEAD.match(text)
    letters, end = _letters_at(text, lead.end() if lead else 0, before_words=False)
    if text[:2].upper() == "A:" and _choice_after(text, 2, choices) != 0:
        return set()  # it may say who speaks
    return letters | _text_beside(text, end, letters, choices) if letters else set()


def _labels_of_choices(text: str, choices: Sequence[str], num_choices: int) -> set[int]:
    """Letters that name options: "(B)", "B." at the start of a line, or elsewhere before the choice's text."""
    labels = set()
    for found in _OPTION.finditer(text):
        index = _index(found["bracketed"] or found["first"] or found["inner"])
        if index < num_choices and (not found["inner"] or _choice_after(text, found.end(), choices) == index):
            labels.add(index)
    return labels


def _letters_at(text: str, start: int, before_words: bool = True) -> tuple[set[int], int]:
    """The letter, or letters as in "A or B", that stand at ``start``, and where they end.

    ``before_words``: a capital that is no English word may stand before one, as in "the answer is B the stone".
    """
    letters: set[int] = set()
    end, joined = start, ""
    while found := _LETTER.match(text, end):
        join = _JOIN.match(text, found.end())
        in_list = join or joined not in ("", ",")
        closed = ")" in found["close"] or _BRACKETED.search(found[0]) or _END.match(text, found.end())
        word = before_words and found["letter"] in _NO_WORDS and text[found.end() : found.end() + 1].isspace()
        if not (in_list or closed or word):
            break
        letters.add(_index(found["letter"]))
        end = found.end()
        if not join:
            break
        end, joined = join.end(), join["word"].strip()
    return letters, end


def _index(letter: str) -> int:
    return LETTERS.index(letter.upper())


def _text_beside(text: str, end: int, letters: set[int], choices: Sequence[str]) -> set[int]:
    """The choice whose text stands right after its letter, or whose letter does and nothing more."""
    if len(letters) != 1:
        return set()
    bare = _BARE.match(text, end)
    own = [choices[number].strip("()[]\"'*. ").upper() for number in letters if number < len(choices)]
    if bare and bare["letter"].upper() not in own:
        return {_index(bare["letter"])}
    beside = _choice_after(text, end, choices, skip=".:,;)-–— \t\n")
    return set() if beside is None else {beside}


def _choice_after(text: str, start: int, choices: Sequence[str], skip: str = " ") -> int | None:
    """The choice whose text stands there, with the end of a sentence after it."""
    # A part of the text, or long answers would take their length squared.
    part = text[start : start + 2 * max(map(len, choices), default=0) + 100]
    return _choice_at(part.lstrip(skip), choices, _CHOICE_END)


def _choice_at(text: str, choices: Sequence[str], end: re.Pattern[str]) -> int | None:
    """The one choice whose text ``text`` begins with, followed by ``end``; as it is written, else loosely."""
    for read in (str.strip, _loosely):
        written = read(text)
        names = [read(choice) for choice in choices]
        found = [
            index
            for index, name in enumerate(names)
            if not _NO_TEXT.fullmatch(name) and written.startswith(name) and end.match(written, len(name))
        ]
        if len(found) == 1:
            return found[0]
    return None


def _loosely(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text).casefold().strip(" \t\n\"'*_(").rstrip(".!,;:)\"'*")
    return re.sub(r"^(?:an?|the) ", "", text)


def official_answer(text: str, num_choices: int = MOST_CHOICES) -> Answer:
    """What LLaVA's ``eval_science_qa.py`` makes of an answer.

    Its full stops match anything: "The answer is Apple" states A. Letters beyond E, or beyond the choices, are wrong.
    """
    letters = LETTERS[:MOST_CHOICES]
    if len(text) == 1 and text in letters:
        stated = [text]
    elif len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        stated = [text[0]]
    else:
        stated = _OFFICIAL.findall(text)
    if len(stated) != 1:
        return Answer(-1, SEVERAL_LETTERS if stated else NO_LETTER)
    index = _index(stated[0])
    return Answer(index) if index < min(num_choices, MOST_CHOICES) else Answer(-1, OUT_OF_RANGE)
