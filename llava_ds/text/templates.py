"""Conversation templates as frozen records: the exact text around the turns, and which of it is supervised.

The strings are those of the LLaVA paper's Table 2 (v0) and of its later releases. A tokenizer's own chat template is
in chat_template.py; it gives the same pieces.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import ConfigError
from llava_ds.schema import Turn

START = "start"
BOS = "bos"
EOS = "eos"


@dataclass(frozen=True)
class Special:
    """A special token of the tokenizer. Text never turns into one.

    ``kind`` is ``bos``, ``eos``, ``start`` (bos, where the tokenizer begins texts with it) or the token's own string,
    which stays text where the tokenizer has no such token.
    """

    kind: str


@dataclass(frozen=True)
class ImageSlot:
    """Where an image stands."""


Part = str | Special


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation; the loss reads the supervised ones."""

    content: Part | ImageSlot
    supervised: bool = False


class AnyTemplate(Protocol):
    """What encoding and generation ask of a template."""

    @property
    def name(self) -> str:
        """How recipes call it."""

    @property
    def drops_question(self) -> bool:
        """Only the images of a user turn are kept (stage 1 of the released code)."""

    @property
    def is_tokenizers_own(self) -> bool:
        """Whether spaces beside special tokens follow the tokenizer's own way instead of SentencePiece's."""

    @property
    def stop(self) -> Part:
        """What ends an answer."""

    def pieces(self, turns: Sequence[Turn], open_ended: bool = False) -> Iterator[Piece]:
        """The conversation, whole, or ``open_ended`` up to where the assistant's answer begins."""


@dataclass(frozen=True)
class Template:
    """One conversation reads: ``begin``, then for each round ``user`` ``assistant`` ``answer`` ``stop``.

    ``between`` stands between two rounds, ``end`` after the last. ``{}`` is the place of the turn's text.
    The loss reads ``answer`` and ``stop``, nothing else.
    """

    name: str
    begin: tuple[Part, ...]
    user: tuple[Part, ...]
    assistant: tuple[Part, ...]
    answer: str
    stop: Part
    between: tuple[Part, ...] = ()
    end: str = ""
    drops_question: bool = False
    is_tokenizers_own: bool = False

    def pieces(self, turns: Sequence[Turn], open_ended: bool = False) -> Iterator[Piece]:
        """See ``AnyTemplate``."""
        yield Piece(Special(START))
        yield from map(Piece, self.begin)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                yield Piece(self.answer.replace("{}", turn.text), supervised=True)
                yield Piece(self.stop, supervised=True)
                continue
            if number:
                yield from map(Piece, self.between)
            yield from self._user_pieces(turn.text)
            yield from map(Piece, self.assistant)
        if not open_ended:
            yield Piece(self.end)

    def _user_pieces(self, text: str) -> Iterator[Piece]:
        if self.drops_question:
            yield from (Piece(ImageSlot()) for _ in range(text.count(IMAGE_PLACEHOLDER)))
            return
        for part in self.user:
            # The text is put into the pattern piece by piece, so that braces in it stay text.
            before, braces, after = part.partition("{}") if isinstance(part, str) else (part, "", "")
            yield Piece(before)
            if braces:
                yield from text_with_images(text)
                yield Piece(after)


def text_with_images(text: str, supervised: bool = False) -> Iterator[Piece]:
    """A turn's text, cut at its image placeholders."""
    for number, chunk in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            yield Piece(ImageSlot())
        yield Piece(chunk, supervised)


_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_IM_START, _IM_END = Special("<|im_start|>"), Special("<|im_end|>")


def _vicuna(name: str, system: str) -> Template:
    return Template(name, (system + " ",), ("USER: {} ",), ("ASSISTANT:",), " {}", Special(EOS))


def _chatml(name: str, system: str) -> Template:
    """The official layout: no line break after ``<|im_end|>``."""
    return Template(
        name, (_IM_START, "system\n" + system, _IM_END), (_IM_START, "user\n{}", _IM_END), (_IM_START, "assistant\n"),
        "{}", _IM_END,
    )


def _inst(name: str, system: str, between: tuple[Part, ...]) -> Template:
    return Template(name, ("[INST] " + system,), ("{} ",), ("[/INST]",), " {} ", Special(EOS), between)


_TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", (), ("{}",), (), "{}", "\n", drops_question=True),
        # One line a round: the quickstart's small LLM has no room for a system prompt.
        Template("short", (), ("Q: {}\n",), ("A:",), " {}", Special(EOS)),
        Template("v0", (_CURIOUS_HUMAN + "\n\n###",), (" Human: {}\n",), ("### Assistant:",), " {}\n", "###", end=" "),
        _vicuna("v1", _CURIOUS_HUMAN.replace("human", "user")),
        _vicuna("llava_v1", _CURIOUS_HUMAN),
        _inst("llava_llama_2", f"<<SYS>>\n{_LANGUAGE_AND_VISION}\n<</SYS>>\n\n", (Special(BOS), "[INST] ")),
        _inst("mistral", "", ("[INST] ",)),
        _chatml("mpt", _MPT),
        _chatml("chatml", "Answer the questions."),
    )
}
# Names of the released code.
_ALIASES = {
    "v0_plain": "plain", "vicuna_v0": "v0", "vicuna_v1": "v1", "llama_2": "llava_llama_2", "llava_llama2":
    "llava_llama_2", "mistral_instruct": "mistral", "chatml_direct": "chatml", "mpt_text": "mpt",
}

CHAT_TEMPLATE = "chat_template"
"""Name of the template that the tokenizer brings itself."""


def list_templates() -> list[str]:
    """Every name that ``get_template`` and ``resolve_template`` know."""
    return [*_TEMPLATES, *_ALIASES, CHAT_TEMPLATE]


def get_template(name: str) -> Template:
    """The frozen template of that name. Raises ConfigError that lists the known ones."""
    name = _ALIASES.get(name, name)
    if name not in _TEMPLATES:
        near = difflib.get_close_matches(name, list_templates(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown template {name!r}; {hint}Known templates: {', '.join(list_templates())}")
    return _TEMPLATES[name]
