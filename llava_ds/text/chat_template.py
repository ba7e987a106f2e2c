"""The chat template that a tokenizer brings itself, as the same pieces that a frozen template gives.

The conversation is rendered once, with a mark in the place of every turn's text. What lies between the marks is the
template's, where special tokens are meant; the texts take the marks' places afterwards, so a special token's string in
them stays text. Supervised are the answers and what follows them up to the first special token, the stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Role, Turn
from llava_ds.text.templates import CHAT_TEMPLATE, AnyTemplate, Part, Piece, Special, get_template, text_with_images

# From Unicode's private use area: no tokenizer's template looks at them.
_MARK = "\ue0b0{}\ue0b1"
_MARKS = re.compile("\ue0b0(\\d+)\ue0b1")
_PROBE = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's own template; see ``resolve_template``."""

    tokenizer: Any
    stop: Part
    strips: tuple[Role, ...] = ()
    """Roles whose texts the template strips."""
    name: str = CHAT_TEMPLATE
    drops_question: bool = False
    is_tokenizers_own: bool = True

    def pieces(self, turns: Sequence[Turn], open_ended: bool = False) -> Iterator[Piece]:
        """The conversation as pieces. Raises DataError when the template refuses it."""
        rendered = _MARKS.split(_render(self.tokenizer, turns, open_ended))
        follows_answer = False
        for between, number in zip(rendered[::2], [*rendered[1::2], None], strict=True):
            for part in _split_specials(between, self.tokenizer):
                yield Piece(part, supervised=follows_answer)
                follows_answer = follows_answer and not isinstance(part, Special)
            if number is not None:
                turn = turns[int(number)]
                follows_answer = turn.role == "assistant"
                text = turn.text.strip() if turn.role in self.strips else turn.text
                yield from text_with_images(text, supervised=follows_answer)


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
    stop = _find_stop(tokenizer)
    spaced = _render(tokenizer, _PROBE, space=" ")
    strips: tuple[Role, ...] = tuple(
        turn.role for number, turn in enumerate(_PROBE[:2]) if f" {_MARK.format(number)} " not in spaced
    )
    return ChatTemplate(tokenizer, stop, strips)


def _find_stop(tokenizer: Any) -> Special:
    """The special token after an answer. Raises ConfigError when the template keeps no turn, or has no such token."""
    try:
        rendered = _MARKS.split(_render(tokenizer, _PROBE))
    except DataError as error:
        raise ConfigError(f"the tokenizer's chat template refuses a plain conversation: {error}") from error
    if rendered[1::2] != ["0", "1", "2", "3"]:
        raise ConfigError(
            "the tokenizer's chat template does not write two rounds of user and assistant once and in order, it wrote "
            f"turns {rendered[1::2]}; name a template of llava_ds instead (docs/data.md)"
        )
    stops = [
        next((part for part in _split_specials(text, tokenizer) if isinstance(part, Special)), None)
        for text in (rendered[4], rendered[8])
    ]
    if stops[0] is None or stops[0] != stops[1]:
        raise ConfigError(
            f"the tokenizer's chat template ends answers with {[stop and stop.kind for stop in stops]}: one special "
            "token after every answer is needed; name a template of llava_ds instead (docs/data.md)"
        )
    return stops[0]


def _render(tokenizer: Any, turns: Sequence[Turn], open_ended: bool = False, space: str = "") -> str:
    messages = [
        {"role": turn.role, "content": space + _MARK.format(number) + space} for number, turn in enumerate(turns)
    ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_ended))
    except Exception as error:  # a Jinja template raises whatever it wants
        raise DataError(
            f"the tokenizer's chat template refuses it: {type(error).__name__}: {error}",
            reason="the tokenizer's chat template refuses it",
        ) from error


def _split_specials(text: str, tokenizer: Any) -> Iterator[Part]:
    """The template's own text, cut at its special tokens; those that swallow the space beside them do so."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not added:
        yield text
        return
    longest_first = sorted(map(re.escape, added), key=len, reverse=True)
    parts = re.split(f"({'|'.join(longest_first)})", text)
    for number, part in enumerate(parts):
        if number % 2:
            yield Special(part)
            continue
        if number and added[parts[number - 1]].rstrip:
            part = part.lstrip()
        if number + 1 < len(parts) and added[parts[number + 1]].lstrip:
            part = part.rstrip()
        if part:
            yield part
