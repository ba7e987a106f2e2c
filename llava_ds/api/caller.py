"""From one request to its reply: out of the cache, from the same request in flight, or by as many calls as it takes."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future
from dataclasses import replace

from llava_ds.api.budget import Account
from llava_ds.api.cache import ReplyCache
from llava_ds.api.connection import Connection
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.faults import Fault, NoReply
from llava_ds.api.limits import Pace
from llava_ds.api.messages import ChatReply, ChatRequest
from llava_ds.api.report import ApiReport
from llava_ds.api.retries import RetryPolicy
from llava_ds.api.tokens import Tokens, expected_tokens, worst_tokens
from llava_ds.errors import ConfigError

_NOTHING = Tokens(0, 0)
_NO_MODEL = {"wrong_model", "bad_json"}
"""Faults that another model answers with, a login page, or what is no chat endpoint."""
_MOST_USELESS = 3
"""Requests that meet these before the endpoint is given up: a gateway may have one odd answer to one odd request."""


class Stopped(Exception):
    """The run ends before this request was asked."""


class Caller:
    """Replies to requests, from any number of threads, until ``stop`` is set."""

    def __init__(
        self, endpoint: Endpoint, connection: Connection, cache: ReplyCache, account: Account, pace: Pace,
        retries: RetryPolicy, report: ApiReport, stop: threading.Event,
    ) -> None:
        self._endpoint, self._connection, self._cache, self._account = endpoint, connection, cache, account
        self._pace, self._retries, self._report, self._stop = pace, retries, report, stop
        self._in_flight: dict[str, Future[ChatReply]] = {}
        self._mutex = threading.Lock()
        self._num_useless = 0

    def reply_to(self, request: ChatRequest) -> ChatReply:
        """The reply, on disk on return.

        Raises NoReply when this request gets none, ConfigError when none will, Stopped when the run has ended.
        """
        if self._stop.is_set():
            raise Stopped
        key = request.key()
        with self._mutex:
            same, mine = self._in_flight.get(key), Future[ChatReply]()
            if same is None:
                self._in_flight[key] = mine
        if same is not None:
            reply = replace(same.result(), cached=True)
            self._report.count("shared")
            return reply
        try:
            reply = self._from_cache(key) or self._call(request)
            mine.set_result(reply)
            return reply
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._mutex:
                del self._in_flight[key]

    def _from_cache(self, key: str) -> ChatReply | None:
        found = self._cache.get(key)
        if found is None:
            return None
        self._report.count("from_cache")
        if found.base_url != self._endpoint.public_url:
            self._report.count("from_other_endpoint")
        return found.reply

    def _call(self, request: ChatRequest) -> ChatReply:
        faults: list[Fault] = []
        waited_s = 0.0
        while True:
            try:
                return self._try(request)
            except Fault as error:
                faults.append(error)
            if faults[-1].ends != "try":
                raise self._final(request, faults[-1])
            wait_s = self._retries.wait_s(len(faults), faults[-1].retry_after_s, random.random())
            waited_s += wait_s
            if len(faults) >= self._retries.max_tries or waited_s > self._retries.max_total_wait_s:
                raise self._given_up(faults)
            self._sleep(wait_s)

    def _try(self, request: ChatRequest) -> ChatReply:
        """One call, within budget and pace; a reply is on disk on return."""
        worst = worst_tokens(request)
        if not self._account.reserve(worst):
            raise NoReply("budget")
        paid = _NOTHING
        try:
            self._sleep(self._pace.take(sum(expected_tokens(request))))
            self._report.count("calls")
            received = self._connection.send(request)
            reply = received.reply
            # What was estimated may be too little: the account takes the bound.
            paid = worst if received.is_estimated else Tokens(reply.prompt_tokens, reply.completion_tokens)
            self._report.count_paid(reply, received.is_estimated)
            self._cache.put(request, reply, self._endpoint.public_url)
            return reply
        except Fault as fault:
            paid = fault.paid or (worst if fault.may_be_paid else _NOTHING)
            self._report.count_fault(fault, worst)
            raise
        finally:
            self._account.settle(worst, paid)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise Stopped

    def _final(self, request: ChatRequest, fault: Fault) -> Exception:
        if fault.ends == "request":
            return NoReply(f"refused: {fault}")
        return ConfigError(
            f"{self._endpoint.public_url} answered request {request.id!r} for model {request.model!r} with {fault}.\n"
            f"  Check --base-url, --model, and the key and quota behind {self._endpoint.api_key_env}. What was paid is "
            "in the cache: run again to go on."
        )

    def _given_up(self, faults: list[Fault]) -> Exception:
        problem = f"{faults[-1]} (try {len(faults)})"
        # An endpoint that never answers as the model would be paid for every try of every request.
        if {fault.kind for fault in faults} <= _NO_MODEL and not self._report.has_replies:
            with self._mutex:
                self._num_useless += 1
            if faults[-1].kind == "wrong_model" or self._num_useless >= _MOST_USELESS:
                return ConfigError(
                    f"{self._endpoint.public_url}: {problem}.\n  No reply of use has come from there: check --base-url "
                    "and --model."
                )
        return NoReply(f"gave up: {problem}")
