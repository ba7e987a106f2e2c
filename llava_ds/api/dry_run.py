"""What a run would ask and cost, without asking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llava_ds.api.budget import Prices
from llava_ds.api.cache import ReplyCache
from llava_ds.api.messages import ChatRequest


@dataclass(frozen=True)
class Estimate:
    """Of one attempt each: calls, those in the cache, tokens of the others, and their cost in US dollars.

    ``prompt_tokens`` and ``cost_usd`` are expected (4 bytes a token, all of ``max_tokens``), ``max_cost_usd`` a bound.
    """

    calls: int
    calls_in_cache: int
    prompt_tokens: int
    max_completion_tokens: int
    cost_usd: float
    max_cost_usd: float

    def summary(self) -> str:
        """A line for people."""
        raise NotImplementedError


def estimate(requests: Iterable[ChatRequest], cache: ReplyCache, prices: Prices) -> Estimate:
    """What asking ``requests`` once would take; duplicates count once."""
    raise NotImplementedError
