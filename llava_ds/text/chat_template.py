"""The chat template that a tokenizer brings itself, as the same pieces that a frozen template gives.

The conversation is rendered with a mark in the place of every turn's text. What lies between the marks is the
template's, where special tokens are meant; the texts take the marks' places afterwards, so a special token's string in
them stays text. Supervised is what the model is to write: all that follows the generation prompt, up to the first
special token behind the answer, the stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Turn
from llava_ds.text.templates import CHAT_TEMPLATE, AnyTemplate, Part, Piece, Special, get_template, text_with_images

# From Unicode's private use area: no tokenizer's template looks at them.
_MARK = "\ue0b0{}\ue0b1"
_MARKS = re.compile("\ue0b0(\\d+)\ue0b1")
_PROBE = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
# What the templates of LLaMA 3.2 say where they cannot ask for the date: ids must not change from day to day.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's own template; see ``resolve_template``."""

    tokenizer: Any
    stop: Special
    prompt_tail: str
    """What stands between a question and the answer that is to be generated."""
    splitter: _Splitter
    name: str = CHAT_TEMPLATE
    drops_question: bool = False
    is_tokenizers_own: bool = True

    def pieces(self, turns: Sequence[Turn], open_ended: bool = False) -> Iterator[Piece]:
        """The conversation as pieces. Raises DataError when the template refuses it, or leaves out some of it."""
        rendered = _render_whole(self.tokenizer, turns)
        spaces = _kept_spaces(self.tokenizer, turns, rendered)
        for number, between in enumerate(rendered):
            before = turns[number - 1] if number else None
            after = turns[number] if number < len(turns) else None
            if before is not None:
                yield Piece(spaces[number - 1][1], supervised=before.role == "assistant")
            if open_ended and after is None:
                yield from map(Piece, self.splitter.split(self.prompt_tail))
                return
            is_answer_next = after is not None and after.role == "assistant"
            prompt = self.prompt_tail if is_answer_next and between.startswith(self.prompt_tail) else between
            yield from self._between(prompt, follows_answer=before is not None and before.role == "assistant")
            yield from (Piece(part, supervised=True) for part in self.splitter.split(between[len(prompt) :]))
            if after is not None:
                yield Piece(spaces[number][0], supervised=is_answer_next)
                yield from text_with_images(after.text.strip(), supervised=is_answer_next)

    def _between(self, text: str, follows_answer: bool) -> Iterator[Piece]:
        for part in self.splitter.split(text):
            yield Piece(part, supervised=follows_answer)
            follows_answer = follows_answer and not isinstance(part, Special)


def resolve_template(name: str, tokenizer: Any) -> AnyTemplate:
    """The template of that name; ``chat_template`` is the tokenizer's own.

    Raises ConfigError when the name is unknown, or the tokenizer has no chat template that can be used.
    """
    if name != CHAT_TEMPLATE:
        return get_template(name)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the template {name!r} is the tokenizer's own, but {tokenizer.name_or_path or 'this tokenizer'} has none; "
            "name one of llava_ds (docs/data.md)"
        )
    splitter = _Splitter.of(tokenizer)
    try:
        rendered = _render_whole(tokenizer, _PROBE)
        prompt_tail = _prompt_tail(tokenizer, rendered)
    except DataError as error:
        raise ConfigError(
            f"the tokenizer's chat template cannot be used for two rounds of user and assistant: {error}\n"
            "  Name a template of llava_ds instead (docs/data.md)."
        ) from error
    return ChatTemplate(tokenizer, _find_stop(rendered, splitter), prompt_tail, splitter)


def chat_template_text(tokenizer: Any) -> str:
    """The tokenizer's chat template, every day the same."""
    text = str(tokenizer.get_chat_template())
    return _FIXED_DATE + text if "strftime_now" in text else text


def _prompt_tail(tokenizer: Any, rendered: Sequence[str]) -> str:
    """Raises ConfigError when the prompt to generate from is not the beginning of what is trained."""
    asked = [_render(tokenizer, _PROBE[:n], True) for n in (1, 3)]
    tails = [_MARKS.split(text)[-1] for text in asked]
    knows_no_prompt = asked[0] == _render(tokenizer, _PROBE[:1], False)
    if knows_no_prompt and rendered[1].strip() != tails[0].strip():  # it writes more before an answer than space
        return rendered[1]
    if tails[0] != tails[1] or not all(part.startswith(tails[0]) for part in (rendered[1], rendered[3])):
        raise ConfigError(
            f"the tokenizer's chat template asks for an answer with {tails[0]!r}, but writes {rendered[1]!r} and "
            f"{rendered[3]!r} before answers that are there: a model trained on these would not see its prompt.\n"
            "  Name a template of llava_ds instead (docs/data.md)."
        )
    return tails[0]


def _find_stop(rendered: Sequence[str], splitter: _Splitter) -> Special:
    """The special token after an answer. Raises ConfigError when there is none, or not the same one."""
    stops = [
        next((part for part in splitter.split(text) if isinstance(part, Special)), None)
        for text in (rendered[2], rendered[4])
    ]
    if stops[0] is None or stops[0] != stops[1]:
        raise ConfigError(
            f"the tokenizer's chat template ends answers with {[stop and stop.kind for stop in stops]}: one special "
            "token after every answer is needed; name a template of llava_ds instead (docs/data.md)"
        )
    return stops[0]


def _render_whole(tokenizer: Any, turns: Sequence[Turn], spaced: bool = False) -> list[str]:
    """What stands before, between and behind the texts. Raises DataError unless each stands once and in order."""
    rendered = _MARKS.split(_render(tokenizer, turns, False, spaced))
    if rendered[1::2] != [str(number) for number in range(len(turns))]:
        raise DataError(
            f"the tokenizer's chat template does not write all of {len(turns)} turns once and in order, it wrote "
            f"{rendered[1::2]}",
            reason="the tokenizer's chat template does not write every turn once",
        )
    return rendered[::2]


def _render(tokenizer: Any, turns: Sequence[Turn], open_ended: bool, spaced: bool = False) -> str:
    messages = []
    for number, turn in enumerate(turns):
        before, after = _spaces_around(turn.text) if spaced else ("", "")
        messages.append({"role": turn.role, "content": before + _MARK.format(number) + after})
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=chat_template_text(tokenizer), tokenize=False, add_generation_prompt=open_ended
            )
        )
    except Exception as error:  # a Jinja template raises whatever it wants
        raise DataError(
            f"the tokenizer's chat template refuses it: {type(error).__name__}: {error}",
            reason="the tokenizer's chat template refuses it",
        ) from error


def _spaces_around(text: str) -> tuple[str, str]:
    core = text.strip()
    return (text, "") if not core else (text[: text.index(core)], text[text.index(core) + len(core) :])


def _kept_spaces(tokenizer: Any, turns: Sequence[Turn], rendered: Sequence[str]) -> list[tuple[str, str]]:
    """What the template leaves of the white space before and behind each text; many strip some of it."""
    given = [_spaces_around(turn.text) for turn in turns]
    if not any(before or after for before, after in given):
        return given
    kept = [["", ""] for _ in turns]
    for number, (bare, spaced) in enumerate(zip(rendered, _render_whole(tokenizer, turns, True), strict=True)):
        # spaced = the end of the text before + bare + the beginning of the text after
        extra = len(spaced) - len(bare)
        behind, before = given[number - 1][1] if number else "", given[number][0] if number < len(turns) else ""
        size = next(
            (n for n in range(extra + 1)
             if spaced[n : n + len(bare)] == bare and behind.startswith(spaced[:n])
             and before.endswith(spaced[n + len(bare) :])),
            None,
        )
        if size is None:
            raise DataError(
                "the tokenizer's chat template changes more of a text than the white space around it",
                reason="the tokenizer's chat template changes texts",
            )
        if number:
            kept[number - 1][1] = spaced[:size]
        if number < len(turns):
            kept[number][0] = spaced[size + len(bare) :]
    return [(before, after) for before, after in kept]


@dataclass(frozen=True)
class _Splitter:
    """Cuts a template's own text at its special tokens; those that swallow the space beside them do so."""

    tokens: re.Pattern[str] | None
    swallow_before: frozenset[str]
    swallow_after: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Any) -> _Splitter:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted((re.escape(token.content) for token in added), key=len, reverse=True)
        return cls(
            re.compile(f"({'|'.join(longest_first)})") if added else None,
            frozenset(token.content for token in added if token.lstrip),
            frozenset(token.content for token in added if token.rstrip),
        )

    def split(self, text: str) -> Iterator[Part]:
        parts = self.tokens.split(text) if self.tokens else [text]
        for number, part in enumerate(parts):
            if number % 2:
                yield Special(part)
                continue
            if number and parts[number - 1] in self.swallow_after:
                part = part.lstrip()
            if number + 1 < len(parts) and parts[number + 1] in self.swallow_before:
                part = part.rstrip()
            if part:
                yield part
