"""The options that commands share, and the client they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ds.api.budget import Budget, Prices
from llava_ds.api.cache import ReplyCache
from llava_ds.api.client import ChatClient
from llava_ds.api.connection import check_installed
from llava_ds.api.endpoint import OPENAI_URL, Endpoint
from llava_ds.api.limits import Limits
from llava_ds.api.retries import RetryPolicy
from llava_ds.cache import cache_folder
from llava_ds.errors import ConfigError


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

    The cache is ``options.cache``, else ``default_cache``, else one folder for the user. Raises ConfigError when
    options lack something or the cache is in use, DataError when it is none, BackendUnavailableError without the
    ``openai`` package.
    """
    _check(options)
    endpoint = Endpoint(options.base_url, options.api_key_env, tuple(options.accept_models), options.timeout_s)
    if not options.dry_run:
        check_installed()
        endpoint.read_key()
    prices = Prices(options.price_in, options.price_out)
    folder = options.cache or default_cache or cache_folder() / "replies"
    return ChatClient(
        endpoint,
        ReplyCache(folder, writable=not options.dry_run, log=log),
        Budget(prices, options.max_cost_usd, options.max_total_tokens),
        Limits(options.concurrency, options.requests_per_minute, options.tokens_per_minute),
        RetryPolicy(options.max_tries),
        log,
    )


def _check(options: ClientOptions) -> None:
    """Raises ConfigError that names all that is missing."""
    problems = []
    if not options.model:
        problems.append("no model is named: give --model")
    unpriced = [name for name, price in (("--price-in", options.price_in), ("--price-out", options.price_out))
                if price is None]
    if options.max_cost_usd is not None and unpriced:
        problems.append(
            f"--max-cost {options.max_cost_usd:g} cannot be held without {' and '.join(unpriced)}: give the prices in "
            "USD for a million tokens, or cap tokens by --max-total-tokens"
        )
    if problems:
        raise ConfigError("\n".join(problems))
