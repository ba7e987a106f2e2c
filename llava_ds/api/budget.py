"""What calls may cost: prices, caps, and an account that no number of concurrent calls can overdraw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens; 0 where nothing is paid or known."""

    prompt_usd_per_million: float = 0.0
    completion_usd_per_million: float = 0.0

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of a call."""
        return (
            prompt_tokens * self.prompt_usd_per_million + completion_tokens * self.completion_usd_per_million
        ) / 1e6


@dataclass(frozen=True)
class Budget:
    """Caps on what one run of a client pays; None is no cap. Replies out of the cache are free."""

    prices: Prices = Prices()
    max_cost_usd: float | None = None
    max_total_tokens: int | None = None
