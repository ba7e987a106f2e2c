"""Conversation templates as frozen records: the exact text around the turns, and which of it is supervised.

The strings are those of the LLaVA paper's Table 2 (v0) and of its later releases (v1, llava_llama_2, plain).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from llava_ds.errors import ConfigError

BOS = "bos"
EOS = "eos"


@dataclass(frozen=True)
class Special:
    """A special token of the tokenizer: ``bos`` or ``eos``. Text never turns into one."""

    kind: str


Part = str | Special


@dataclass(frozen=True)
class Template:
    """One conversation reads: ``begin``, then for each round ``user`` ``assistant`` ``answer`` ``stop``.

    ``between`` stands between two rounds, ``end`` after the last. ``{}`` is the place of the turn's text.
    The loss reads ``answer`` and ``stop``, nothing else.
    """

    name: str
    begin: tuple[Part, ...]
    user: str
    assistant: str
    answer: str
    stop: Part
    between: tuple[Part, ...] = ()
    end: str = ""
    drops_question: bool = False
    """Only the images of a user turn are kept (stage 1 of the released code)."""


_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", (), "{}", "", "{}", "\n", drops_question=True),
        # One line a round: the quickstart's small LLM has no room for a system prompt.
        Template("short", (), "Q: {}\n", "A:", " {}", Special(EOS)),
        Template("v0", (_CURIOUS_HUMAN + "\n\n###",), " Human: {}\n", "### Assistant:", " {}\n", "###", end=" "),
        Template(
            "v1",
            (_CURIOUS_HUMAN.replace("human", "user") + " ",),
            "USER: {} ",
            "ASSISTANT:",
            " {}",
            Special(EOS),
        ),
        Template("llava_v1", (_CURIOUS_HUMAN + " ",), "USER: {} ", "ASSISTANT:", " {}", Special(EOS)),
        Template(
            "llava_llama_2",
            (f"[INST] <<SYS>>\n{_LLAVA_LLAMA_2}\n<</SYS>>\n\n",),
            "{} ",
            "[/INST]",
            " {} ",
            Special(EOS),
            between=(Special(BOS), "[INST] "),
        ),
    )
}


def get_template(name: str) -> Template:
    """The template of that name. Raises ConfigError that lists the known ones."""
    if name not in _TEMPLATES:
        near = difflib.get_close_matches(name, _TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown template {name!r}; {hint}Known templates: {', '.join(_TEMPLATES)}")
    return _TEMPLATES[name]
