"""What goes wrong with a call, and how far it reaches."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from email.utils import parsedate_to_datetime
from typing import Literal

from llava_ds.api.tokens import Tokens

Ends = Literal["try", "request", "run"]
_RETRYABLE = {408, 409, 429}
_WRONG_ENDPOINT = {401, 402, 403, 404}
_MAY_BE_PAID = {408, 502, 504}
"""From a server in between, which no longer waits for the one that answers."""


class Fault(Exception):
    """A call without an acceptable reply.

    ``kind`` is what reports count by: ``http_429``, ``timeout``, ``connection``, ``bad_json``,
    ``wrong_model``. ``ends`` says what it ends: this try, this request, or the run. ``paid`` are the tokens of a reply
    that came and is of no use; ``may_be_paid``: the server may have answered, and nobody knows.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        ends: Ends = "try",
        retry_after_s: float | None = None,
        paid: Tokens | None = None,
        may_be_paid: bool = False,
    ) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail, self.ends = kind, detail, ends
        self.retry_after_s, self.paid, self.may_be_paid = retry_after_s, paid, may_be_paid

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class NoReply(Exception):
    """A request gets no reply; the text is the outcome's problem."""


def http_fault(status: int, names: Collection[str | None], detail: str, headers: Mapping[str, str]) -> Fault:
    """The fault that an HTTP status other than 2xx is. ``names`` are the endpoint's own words for it."""
    ends: Ends = "request"
    if status in _WRONG_ENDPOINT or "insufficient_quota" in names:
        ends = "run"
    elif status in _RETRYABLE or status >= 500:
        ends = "try"
    return Fault(f"http_{status}", detail, ends, read_retry_after(headers), may_be_paid=status in _MAY_BE_PAID)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: Retry-After in seconds or as a date (RFC 9110, 10.2.3), or retry-after-ms.

    None where it does not ask, or in a way that cannot be read.
    """
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        return None if text is None else max(0.0, float(text))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time()) if date.tzinfo else None
