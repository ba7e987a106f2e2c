"""What calls may cost: prices, caps, and an account that no number of concurrent calls can overdraw."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from llava_ds.api.tokens import Tokens


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens; None where nobody said."""

    prompt_usd_per_million: float | None = None
    completion_usd_per_million: float | None = None

    def cost_usd(self, tokens: Tokens) -> float | None:
        """What tokens cost; None where their price is not known."""
        counted = list(zip(tokens, (self.prompt_usd_per_million, self.completion_usd_per_million), strict=True))
        if any(count and price is None for count, price in counted):
            return None
        return sum(count * price for count, price in counted if price) / 1e6


def format_usd(cost_usd: float | None, num_digits: int = 4) -> str:
    """A cost for people."""
    return "no prices given" if cost_usd is None else f"${cost_usd:.{num_digits}f}"


@dataclass(frozen=True)
class Budget:
    """Caps on what one client pays; None is no cap. Replies out of the cache are free. Of unknown cost nothing fits.

    A call counts with its bound (a token of each byte, all of ``max_tokens``) until its reply says what it took, and
    for good where it does not say, or the reply was lost on the way: it may have been paid.
    """

    prices: Prices = Prices()
    max_cost_usd: float | None = None
    max_total_tokens: int | None = None


class Account:
    """What a client has paid and what its calls in flight may yet take; safe from any number of threads."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._changed = threading.Condition()
        self._paid = self._reserved = Tokens(0, 0)
        self._is_spent = False

    def reserve(self, worst: Tokens) -> bool:
        """Sets the worst case of a call aside; every True is followed by ``settle``.

        Waits while calls in flight may still leave enough. False: the budget is spent, for this call and all later.
        """
        with self._changed:
            while not self._is_spent and not self._fits(worst):
                if any(self._reserved):
                    self._changed.wait()
                else:
                    self._is_spent = True
                    self._changed.notify_all()
            if not self._is_spent:
                self._reserved = self._reserved.plus(worst)
            return not self._is_spent

    def settle(self, worst: Tokens, paid: Tokens) -> None:
        """Books what a call took in the place of what was set aside for it."""
        with self._changed:
            self._reserved = self._reserved.minus(worst)
            self._paid = self._paid.plus(paid)
            self._changed.notify_all()

    def _fits(self, worst: Tokens) -> bool:
        total = self._paid.plus(self._reserved).plus(worst)
        max_cost_usd, max_tokens = self._budget.max_cost_usd, self._budget.max_total_tokens
        if max_cost_usd is not None:
            cost_usd = self._budget.prices.cost_usd(total)
            if cost_usd is None or cost_usd > max_cost_usd:
                return False
        return max_tokens is None or sum(total) <= max_tokens
