"""Asks an endpoint many requests at a time, and pays for each reply once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from llava_ds.api.budget import Budget
from llava_ds.api.cache import ReplyCache
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.limits import Limits
from llava_ds.api.messages import ChatReply, ChatRequest, Outcome
from llava_ds.api.report import ApiReport
from llava_ds.api.retries import RetryPolicy

Check = Callable[[ChatRequest, ChatReply], str | None]


class ChatClient:
    """A client of one endpoint; a context manager that lets the cache go at its end."""

    def __init__(
        self,
        endpoint: Endpoint,
        cache: ReplyCache,
        budget: Budget,
        limits: Limits,
        retries: RetryPolicy,
        log: Callable[[str], None] = print,
    ) -> None:
        self.endpoint, self.cache, self.budget, self.limits, self.retries = endpoint, cache, budget, limits, retries
        self.report = ApiReport()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the cache go."""
        self.cache.close()

    def ask(
        self, requests: Iterable[ChatRequest], check: Check | None = None, max_attempts: int = 1
    ) -> Iterator[Outcome]:
        """Outcomes as they complete, each request's exactly once.

        ``check``, called from threads, returns a reason to refuse a reply, which is then asked again with
        ``attempt + 1``, up to ``max_attempts`` in all.
        """
        raise NotImplementedError
