"""What a run would ask and cost, without asking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from llava_ds.api.budget import Prices, format_usd
from llava_ds.api.cache import ReplyCache
from llava_ds.api.messages import ChatRequest
from llava_ds.api.tokens import Tokens, expected_tokens, worst_tokens


@dataclass(frozen=True)
class Estimate:
    """Of one attempt each: calls, those in the cache, tokens of the others, and their cost in US dollars,
    None where the prices are not known.

    ``prompt_tokens`` and ``cost_usd`` are expected (4 bytes a token, all of ``max_tokens``), ``max_cost_usd`` a bound.
    """

    calls: int
    calls_in_cache: int
    prompt_tokens: int
    max_completion_tokens: int
    cost_usd: float | None
    max_cost_usd: float | None

    def summary(self) -> str:
        """A line for people."""
        cost = f"about {format_usd(self.cost_usd, 2)}, at most {format_usd(self.max_cost_usd, 2)}"
        return (
            f"{self.calls} calls, {self.calls_in_cache} of them in the cache; the others take about "
            f"{self.prompt_tokens} prompt tokens and at most {self.max_completion_tokens} completion tokens: "
            f"{'no prices given' if self.max_cost_usd is None else cost}, and more for each reply that is asked again"
        )


def estimate(requests: Iterable[ChatRequest], cache: ReplyCache, prices: Prices) -> Estimate:
    """What asking ``requests`` once would take; the same request twice counts once."""
    calls = {request.key(): request for request in requests}
    missing = [request for key, request in calls.items() if key not in cache]
    expected = reduce(Tokens.plus, map(expected_tokens, missing), Tokens(0, 0))
    worst = reduce(Tokens.plus, map(worst_tokens, missing), Tokens(0, 0))
    return Estimate(
        len(calls), len(calls) - len(missing), *expected, prices.cost_usd(expected), prices.cost_usd(worst)
    )
