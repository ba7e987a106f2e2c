"""What is asked of a chat endpoint, what it answers, and what became of a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llava_ds.errors import ConfigError

# The client reads one whole answer a call, and sets these itself; a seed may be left out, but not be another.
_NOT_EXTRA = ("model", "messages", "stream", "n", "seed")
_NO_SEED = ("seed", None)
_LENGTHS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class ChatRequest:
    """One question to a model.

    ``id`` names it in reports and errors; it is neither sent nor part of the key. ``attempt`` asks the same again: it
    is part of the key and not sent, except that a given ``seed`` is sent as ``seed + attempt``. ``extra_body`` holds
    JSON values that go beside the fields above or in their place, e.g. ``{"grammar": "..."}``; None leaves a field out,
    as in ``{"max_tokens": None, "max_completion_tokens": 512}`` or ``{"seed": None}``. Repeats of a question differ in
    their seed, sent or not: attempts are what a client counts on from ``attempt`` when a reply is refused, and would
    meet those of another repeat.

    Raises ConfigError when ``extra_body`` names a field that is the client's own, or leaves the reply without a longest
    length, which caps on cost reckon with.
    """

    id: str
    model: str
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict, hash=False)
    attempt: int = 0

    def __post_init__(self) -> None:
        own = [name for name, value in self.extra_body.items() if name in _NOT_EXTRA and (name, value) != _NO_SEED]
        if own:
            raise ConfigError(f"extra_body holds {', '.join(own)}, which the client sets itself; leave that out")
        lengths = self._lengths()
        if not lengths or any(type(length) is not int or length < 1 for length in lengths.values()):
            found = ", ".join(f"{name} {length!r}" for name, length in lengths.items()) or "neither"
            raise ConfigError(
                "a request needs max_tokens or max_completion_tokens as a whole number of at least 1, found "
                f"{found}: a reply without a longest length may cost anything; give extra_body such as "
                '{"max_tokens": null, "max_completion_tokens": 512}'
            )

    @property
    def max_reply_tokens(self) -> int:
        """The longest reply; of two lengths, the larger one, for servers differ in which they heed."""
        return max(self._lengths().values())

    def body(self) -> dict[str, Any]:
        """All that is sent, as JSON values."""
        fields = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": None if self.seed is None else self.seed + self.attempt,
            **self.extra_body,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _lengths(self) -> dict[str, Any]:
        fields = {"max_tokens": self.max_tokens, **self.extra_body}
        return {name: fields[name] for name in _LENGTHS if fields.get(name) is not None}

    def key(self) -> str:
        """sha256 of all that is sent, of ``attempt``, and of a ``seed`` that is left out: it tells requests apart."""
        body = self.body()
        parts: dict[str, Any] = {"body": body, "attempt": self.attempt}
        if self.seed is not None and "seed" not in body:
            parts["seed"] = self.seed
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def again(self) -> ChatRequest:
        """The same once more, under a key of its own."""
        return replace(self, attempt=self.attempt + 1)


@dataclass(frozen=True)
class ChatReply:
    """What a model answered.

    ``model`` and ``response_id`` are the server's words, the token counts too; where it gives none they are estimated
    (the report says how often). ``cached``: found in the cache, not paid now.
    """

    text: str
    model: str
    finish_reason: str
    response_id: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    ``request`` is the last one asked: its ``attempt`` says how often. ``reply`` is the accepted one, or None, and then
    ``problem`` says why: ``budget``; ``gave up: http_500: ...`` of the last try; ``refused: http_400: ...`` by the
    endpoint; ``rejected: <reason>`` by the check. ``rejected`` holds the replies that the check refused, with reasons.
    """

    request: ChatRequest
    reply: ChatReply | None
    problem: str | None = None
    rejected: tuple[tuple[ChatReply, str], ...] = ()
