"""From the body of a response to a reply that may be used."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from llava_ds.api.faults import Fault
from llava_ds.api.messages import ChatReply, ChatRequest
from llava_ds.api.tokens import Tokens, expected_tokens, guess_tokens

_VERSION = re.compile(r"[-@:](\d{4}|\d{6}|\d{8}|\d{4}-\d\d-\d\d)", re.ASCII)
"""The date that an endpoint adds to the name of a model that is the same: gpt-4 is answered by gpt-4-0613, never by
gpt-4o or gpt-4-32k."""
_MOST_TOKENS = 10**9
"""No call takes more: a larger count is none."""


class Received(NamedTuple):
    """A reply, and whether its token counts are our estimate."""

    reply: ChatReply
    is_estimated: bool


def read_reply(request: ChatRequest, body: str, accept_models: Collection[str] = ()) -> Received:
    """The reply in the body of a response of status 200; its text may be empty, as when a model that thinks first is
    cut off.

    Raises Fault where there is none, or another model gave it; with what was paid, where the body says that.
    """
    data = _parse(body)
    paid = _read_usage(data)
    try:
        choice = data["choices"][0]
        text = _read_text(choice["message"].get("content"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        why = f"no choices[0].message with text ({type(error).__name__}: {error})"
        raise _unreadable(why, body, paid) from error
    model = _read_word(data, "model")
    if not is_same_model(request.model, model, accept_models):
        raise Fault(
            "wrong_model", f"asked {request.model!r}, answered by {model!r}; where that is right: --accept-model",
            paid=paid, may_be_paid=True,
        )
    tokens = paid or Tokens(expected_tokens(request).prompt, guess_tokens(text))
    reply = ChatReply(text, model, _read_word(choice, "finish_reason"), _read_word(data, "id"), *tokens)
    return Received(reply, is_estimated=paid is None)


def is_same_model(asked: str, answered: str, accept_models: Collection[str] = ()) -> bool:
    """Whether a reply's model is the one asked, the same with its date, or accepted by name."""
    if answered == asked or answered in accept_models:
        return True
    return answered.startswith(asked) and bool(_VERSION.fullmatch(answered[len(asked) :]))


def _parse(body: str) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"not JSON ({error})", body) from error
    if not isinstance(data, dict):
        raise _unreadable("not a JSON object", body)
    return data


def _unreadable(why: str, body: str, paid: Tokens | None = None) -> Fault:
    # Long enough that ``Connection`` finds a key in it before it cuts it short.
    return Fault("bad_json", f"{why}: {body[:1000]!r}", paid=paid, may_be_paid=True)


def _read_text(content: Any) -> str:
    """The text of a message: none, plain, or in parts, of which those that are no text (thinking) are left out."""
    if content is None:
        return ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}, not text")
    return content


def _read_word(data: dict[str, Any], name: str) -> str:
    """A name for reports, which are UTF-8: half a character stands as its escape, ``\\ud83d``."""
    return str(data.get(name) or "").encode(errors="backslashreplace").decode()


def _read_usage(data: dict[str, Any]) -> Tokens | None:
    usage = data.get("usage")
    if isinstance(usage, dict):
        counts = Tokens(usage.get("prompt_tokens", -1), usage.get("completion_tokens", -1))
        if all(type(count) is int and 0 <= count <= _MOST_TOKENS for count in counts):
            return counts
    return None
