"""What a client's run asked, got and paid."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict
from typing import Any

from llava_ds.api.budget import Prices, format_usd
from llava_ds.api.faults import Fault
from llava_ds.api.messages import ChatReply, Outcome
from llava_ds.api.tokens import Tokens


class ApiReport:
    """Counts of a client's run; safe from any number of threads.

    ``counts``: ``requests`` and ``accepted`` of them; ``calls`` over HTTP, ``paid_calls`` of them that brought a
    reply, of use or not, and ``lost_calls`` that may have been paid though nothing of use came (time-outs, cut
    connections, unreadable bodies); ``from_cache`` replies, ``from_other_endpoint`` of them; ``shared`` replies, asked
    once for requests that are the same; ``num_estimated`` replies without token counts of the server.

    ``faults`` by kind, ``problems`` of outcomes by kind, ``models`` as the replies name them, ``attempts``: calls of
    ``check`` by attempt and result. ``paid`` tokens; ``lost`` ones are the bound of the lost calls. Costs are None
    where the prices are not known.
    """

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.attempts: dict[int, Counter[str]] = {}
        self.paid = self.lost = Tokens(0, 0)
        self._lock = threading.Lock()

    @property
    def has_replies(self) -> bool:
        """Whether the endpoint has given a reply of use, now or to the run that filled the cache."""
        return bool(self.models) or self.counts["from_cache"] > self.counts["from_other_endpoint"]

    @property
    def cost_usd(self) -> float | None:
        """What was paid for sure."""
        return self.prices.cost_usd(self.paid)

    def count(self, *names: str) -> None:
        """Adds one to each."""
        with self._lock:
            self.counts.update(names)

    def count_paid(self, reply: ChatReply, is_estimated: bool) -> None:
        """A call that brought a reply."""
        with self._lock:
            self.counts["paid_calls"] += 1
            self.counts["num_estimated"] += is_estimated
            self.models[reply.model] += 1
            self.paid = self.paid.plus(Tokens(reply.prompt_tokens, reply.completion_tokens))

    def count_fault(self, fault: Fault, worst: Tokens) -> None:
        """A call that brought none of use; ``worst`` is what it took at most."""
        with self._lock:
            self.faults[fault.kind] += 1
            if fault.paid is not None:
                self.counts["paid_calls"] += 1
                self.paid = self.paid.plus(fault.paid)
            elif fault.may_be_paid:
                self.counts["lost_calls"] += 1
                self.lost = self.lost.plus(worst)

    def count_check(self, attempt: int, is_accepted: bool) -> None:
        """A reply that was looked at."""
        with self._lock:
            self.attempts.setdefault(attempt, Counter())["accepted" if is_accepted else "rejected"] += 1

    def count_outcome(self, outcome: Outcome) -> None:
        """A request that is done."""
        with self._lock:
            self.counts["requests"] += 1
            self.counts["accepted"] += outcome.reply is not None
            if outcome.problem is not None:
                self.problems[outcome.problem.partition(":")[0]] += 1

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        names = ("requests", "accepted", "calls", "paid_calls", "lost_calls", "from_cache", "from_other_endpoint",
                 "shared", "num_estimated")
        with self._lock:
            return {
                **{name: self.counts[name] for name in names},
                "faults": dict(sorted(self.faults.items())),
                "problems": dict(sorted(self.problems.items())),
                "models": dict(sorted(self.models.items())),
                "attempts": {str(attempt): dict(counts) for attempt, counts in sorted(self.attempts.items())},
                "prices": asdict(self.prices),
                "prompt_tokens": self.paid.prompt,
                "completion_tokens": self.paid.completion,
                "cost_usd": self.prices.cost_usd(self.paid),
                "max_lost_tokens": sum(self.lost),
                "max_lost_cost_usd": self.prices.cost_usd(self.lost),
            }

    def spent(self) -> str:
        """Tokens and cost for people."""
        return f"{self.paid.prompt} + {self.paid.completion} tokens, {format_usd(self.cost_usd)}"

    def summary(self) -> str:
        """A line for people."""
        counts, lost_usd = self.counts, self.prices.cost_usd(self.lost)
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        lost = f", and at most {sum(self.lost)} tokens, {format_usd(lost_usd)}, for {counts['lost_calls']} lost calls"
        estimated = f" (estimated for {counts['num_estimated']} replies without token counts)"
        return (
            f"{counts['accepted']} of {counts['requests']} requests answered: {counts['calls']} calls, "
            f"{counts['from_cache']} replies out of the cache; faults: {faults or 'none'}; {self.spent()}"
            f"{estimated if counts['num_estimated'] else ''}{lost if counts['lost_calls'] else ''}"
        )
