"""Replies on disk, by key of their request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llava_ds.api.messages import ChatReply, ChatRequest


class ReplyCache:
    """A folder of paid replies; each is on disk when ``put`` returns. One writer at a time.

    ``writable=False`` takes no lock, creates nothing, and is for dry runs.
    """

    def __init__(self, folder: Path, writable: bool = True, log: Callable[[str], None] = print) -> None:
        raise NotImplementedError

    def get(self, key: str) -> ChatReply | None:
        """The reply under a key, with ``cached=True``."""
        raise NotImplementedError

    def put(self, request: ChatRequest, reply: ChatReply, base_url: str) -> None:
        """Keeps a reply; it is on disk on return."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets another writer in."""
        raise NotImplementedError
