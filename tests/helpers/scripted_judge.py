"""A judge whose scores are a function of what it is asked, so results can be worked out by hand."""

import hashlib
from typing import Any

from tests.helpers.fault_proxy import chat_reply


def digest(*parts: object) -> int:
    """A number out of texts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def verdict(content: str, seed: int | None) -> str:
    """The reply: every seventh cannot be read; the others score each answer by its words, in one of a few forms."""
    number = digest(content, seed)
    if number % 7 == 0:
        return "I cannot say.\nBoth are fine."
    first, second = (
        1 + digest(content.partition(f"[Assistant {place}]\n")[2].partition("\n\n[End")[0], seed) % 10
        for place in (1, 2)
    )
    form = ("{} {}", "{}, {}", "{}/10 {}/10", "Assistant 1: {}\nAssistant 2: {}")[number % 4]
    return form.format(first, second) + "\nBecause."


class ScriptedJudge:
    """What ``fault_proxy`` may answer by: ``verdict``, under ``names`` in turn or the name that was asked for.

    ``asked`` holds the bodies.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.asked: list[dict[str, Any]] = []

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        self.asked.append(body)
        name = self.names[len(self.asked) % len(self.names)] if self.names else body["model"]
        return chat_reply(verdict(body["messages"][-1]["content"], body.get("seed")), name)
