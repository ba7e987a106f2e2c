"""From the body of a response to a reply that may be used."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from llava_ds.api.faults import Fault
from llava_ds.api.messages import ChatReply, ChatRequest
from llava_ds.api.tokens import Tokens, expected_tokens, guess_tokens

_VERSION = re.compile(r"[-@:]\d.*")
"""What an endpoint adds to the name of a model that is the same: gpt-4 is answered by gpt-4-0613, never by gpt-4o."""


class Received(NamedTuple):
    """A reply, and whether its token counts are our estimate."""

    reply: ChatReply
    is_estimated: bool


def read_reply(request: ChatRequest, body: str, accept_models: Collection[str] = ()) -> Received:
    """The reply in the body of a response of status 200.

    Raises Fault where there is none, it is empty though the model did not stop, or another model gave it.
    """
    data = _parse(body)
    try:
        choice = data["choices"][0]
        content = choice["message"].get("content")
        text = "" if content is None else content
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}, not text")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _unreadable(f"no choices[0].message with text ({type(error).__name__}: {error})", body) from error
    usage, is_estimated = _read_usage(request, data, text)
    model, finish_reason = str(data.get("model") or ""), str(choice.get("finish_reason") or "")
    if not is_same_model(request.model, model, accept_models):
        raise Fault(
            "wrong_model", f"asked {request.model!r}, answered by {model!r}; where that is right: --accept-model",
            paid=usage,
        )
    if not text and finish_reason != "stop":
        raise Fault("empty_reply", f"no text, finish_reason {finish_reason!r}", paid=usage)
    reply = ChatReply(text, model, finish_reason, str(data.get("id") or ""), usage.prompt, usage.completion)
    return Received(reply, is_estimated)


def is_same_model(asked: str, answered: str, accept_models: Collection[str] = ()) -> bool:
    """Whether a reply's model is the one asked, one of its versions, or accepted by name."""
    if answered == asked or answered in accept_models:
        return True
    return answered.startswith(asked) and bool(_VERSION.fullmatch(answered[len(asked) :]))


def _parse(body: str) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError as error:
        raise _unreadable(f"not JSON ({error})", body) from error
    if not isinstance(data, dict):
        raise _unreadable("not a JSON object", body)
    return data


def _unreadable(why: str, body: str) -> Fault:
    return Fault("bad_json", f"{why}: {body[:100]!r}", may_be_paid=True)


def _read_usage(request: ChatRequest, data: dict[str, Any], text: str) -> tuple[Tokens, bool]:
    usage = data.get("usage")
    if isinstance(usage, dict):
        counts = Tokens(usage.get("prompt_tokens", -1), usage.get("completion_tokens", -1))
        if all(type(count) is int and count >= 0 for count in counts):
            return counts, False
    return Tokens(expected_tokens(request).prompt, guess_tokens(text)), True
