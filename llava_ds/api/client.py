"""Asks an endpoint many requests at a time, and pays for each reply once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import closing
from functools import partial

from tqdm import tqdm

from llava_ds.api.budget import Account, Budget
from llava_ds.api.cache import ReplyCache
from llava_ds.api.caller import Caller
from llava_ds.api.connection import Connection
from llava_ds.api.crew import run_concurrently
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.faults import NoReply
from llava_ds.api.limits import Limits, Pace
from llava_ds.api.messages import ChatReply, ChatRequest, Outcome
from llava_ds.api.report import ApiReport
from llava_ds.api.retries import RetryPolicy
from llava_ds.errors import ConfigError

Check = Callable[[ChatRequest, ChatReply], str | None]
_GRACE_S = 10.0
"""For calls in flight when a run ends early: they are paid, and their replies should be kept."""


class ChatClient:
    """A client of one endpoint; a context manager that ends what is asked, and lets the cache go."""

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
        self.report = ApiReport(budget.prices)
        self._account, self._pace, self._log = Account(budget), Pace(limits), log
        self._runs: list[Generator[Outcome]] = []

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is asked, keeping what is in flight, and lets the cache go."""
        for run in self._runs:  # one may be left behind by an exception in the loop over its outcomes
            run.close()
        self.cache.close()

    def ask(
        self, requests: Iterable[ChatRequest], check: Check | None = None, max_attempts: int = 1
    ) -> Iterator[Outcome]:
        """Outcomes as they complete, each request's exactly once; requests are taken as calls come free.

        ``check``, called from threads, returns a reason to refuse a reply, which is then asked again with
        ``attempt + 1``, up to ``max_attempts`` in all. Requests that are the same in all but their id are paid once.
        Once the budget is spent, what the cache does not hold comes as problem ``budget``.

        Raises ConfigError when the endpoint answers nobody (401 to 404, no quota left, never a reply of the model),
        OSError when a reply cannot be kept, and what ``check`` raises. However it ends, calls in flight get 10 s, and
        what was paid is in the cache.
        """
        if not self.cache.writable:
            raise ConfigError(f"{self.cache.folder} was opened for a dry run, which asks nothing; leave out --dry-run")
        self._runs.append(self._ask(requests, check, max_attempts))
        return self._runs[-1]

    def _ask(
        self, requests: Iterable[ChatRequest], check: Check | None, max_attempts: int
    ) -> Generator[Outcome]:
        stop = threading.Event()
        total = len(requests) if isinstance(requests, Sized) else None
        interval_s = 0.5 if sys.stderr.isatty() else 10.0
        with (
            closing(Connection(self.endpoint)) as connection,
            tqdm(total=total, desc="asked", unit="request", file=sys.stderr, mininterval=interval_s) as bar,
        ):
            caller = Caller(self.endpoint, connection, self.cache, self._account, self._pace, self.retries,
                            self.report, stop)
            answer = partial(self._answer, caller, check, max_attempts)
            # Closed here, not when the garbage is collected: the threads end before the connection does.
            with closing(
                run_concurrently(answer, requests, self.limits.concurrency, stop, _GRACE_S, self._log)
            ) as outcomes:
                for outcome in outcomes:
                    self.report.count_outcome(outcome)
                    bar.set_postfix_str(self.report.spent(), refresh=False)
                    bar.update()
                    yield outcome

    def _answer(self, caller: Caller, check: Check | None, max_attempts: int, request: ChatRequest) -> Outcome:
        rejected: list[tuple[ChatReply, str]] = []
        while True:
            try:
                reply = caller.reply_to(request)
            except NoReply as problem:
                return Outcome(request, None, str(problem), tuple(rejected))
            reason = check(request, reply) if check else None
            self.report.count_check(request.attempt, is_accepted=reason is None)
            if reason is None:
                return Outcome(request, reply, None, tuple(rejected))
            rejected.append((reply, reason))
            if len(rejected) >= max_attempts:
                return Outcome(request, None, f"rejected: {reason}", tuple(rejected))
            request = request.again()
