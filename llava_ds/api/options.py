"""The options that commands share, and the client they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ds.api.client import ChatClient
from llava_ds.api.endpoint import OPENAI_URL


@dataclass(frozen=True)
class ClientOptions:
    """What tools/endpoint_options.py fills; prices in US dollars for a million tokens.

    ``model`` and ``extra_body`` are for the requests, which the caller builds; ``dry_run`` asks for ``estimate`` only.
    """

    model: str | None = None
    base_url: str = OPENAI_URL
    api_key_env: str = "OPENAI_API_KEY"
    accept_models: tuple[str, ...] = ()
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_cost_usd: float | None = None
    max_total_tokens: int | None = None
    price_in: float | None = None
    price_out: float | None = None
    timeout_s: float = 120.0
    max_tries: int = 6
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    dry_run: bool = False


def open_client(
    options: ClientOptions, default_cache: Path | None = None, log: Callable[[str], None] = print
) -> ChatClient:
    """The client that options describe. With ``dry_run`` its cache is read only, for ``estimate(requests,
    client.cache, client.budget.prices)``.

    Raises ConfigError when options disagree, BackendUnavailableError without the ``openai`` package.
    """
    raise NotImplementedError
