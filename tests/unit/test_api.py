"""The chat client against a real HTTP proxy that fails on purpose, and its parts by themselves."""

import json
import re
import threading
import time
from dataclasses import replace

import pytest

from llava_ds.api.budget import Account, Budget, Prices
from llava_ds.api.cache import REPLIES_FILE, ReplyCache
from llava_ds.api.client import ChatClient
from llava_ds.api.dry_run import estimate
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.faults import Fault, read_retry_after
from llava_ds.api.limits import Limits, Pace
from llava_ds.api.messages import ChatReply, ChatRequest, Message
from llava_ds.api.reading import is_same_model, read_reply
from llava_ds.api.retries import RetryPolicy
from llava_ds.api.tokens import Tokens, expected_tokens, worst_tokens
from llava_ds.errors import ConfigError, DataError
from tests.helpers.fault_proxy import body_hash, fault_proxy, response_id

QUICK = RetryPolicy(max_tries=3, first_wait_s=0.01)
REPLY = ChatReply("Yes.", "m", "stop", "r1", 11, 2)


def make_request(number: int = 0, **fields) -> ChatRequest:
    return ChatRequest(f"q{number}", "m", (Message("user", f"Question {number}?"),), max_tokens=8, **fields)


def make_client(folder, base_url="http://127.0.0.1:9/v1", budget=None, retries=QUICK, timeout_s=5.0, concurrency=4,
                log=print, **endpoint):
    endpoint = Endpoint(base_url, timeout_s=timeout_s, **endpoint)
    return ChatClient(endpoint, ReplyCache(folder, log=log), budget or Budget(), Limits(concurrency), retries, log)


def reply_body(content="Hi.", **fields) -> dict:
    """Of a response, without token counts unless ``fields`` hold ``usage``."""
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    return {"id": "r", "model": "m", "choices": [choice], **fields}


def echo(body: dict) -> str:
    return "To " + body["messages"][-1]["content"]


# requests


def test_key_is_of_all_that_is_sent_and_of_the_attempt():
    request = make_request(seed=5, extra_body={"grammar": "a", "b": 1})
    same = replace(request, id="other", extra_body={"b": 1, "grammar": "a"})
    assert same.key() == request.key()
    others = [
        request.again(), replace(request, seed=6), replace(request, temperature=0.5), replace(request, max_tokens=9),
        replace(request, extra_body={}), replace(request, top_p=0.5), replace(request, model="n"),
        replace(request, messages=(Message("system", "Question 0?"),)),
    ]
    assert len({request.key(), *(other.key() for other in others)}) == 9
    unsent = [make_request(seed=seed, extra_body={"seed": None}) for seed in (5, 6)]
    assert unsent[0].body() == unsent[1].body() == make_request().body()
    assert len({unsent[0].key(), unsent[1].key(), make_request().key()}) == 3


def test_attempt_moves_the_seed_and_none_leaves_a_field_out():
    request = make_request(seed=5, extra_body={"max_tokens": None, "max_completion_tokens": 7}).again()
    assert request.body() == {
        "model": "m", "messages": [{"role": "user", "content": "Question 0?"}], "temperature": 0.0, "top_p": 1.0,
        "seed": 6, "max_completion_tokens": 7,
    }
    assert expected_tokens(request) == (8 + 3, 7)
    assert "attempt" not in request.body() and "seed" not in make_request().body()


def test_extra_body_may_not_set_what_the_client_sets():
    with pytest.raises(ConfigError, match="holds n, stream, seed,"):
        make_request(extra_body={"n": 2, "stream": True, "top_k": 1, "seed": 0})


@pytest.mark.parametrize(
    ("extra_body", "found"),
    [({"max_tokens": None}, "found neither"), ({"max_tokens": -1}, "found max_tokens -1:"),
     ({"max_tokens": "many"}, "found max_tokens 'many':"), ({"max_tokens": True}, "found max_tokens True:"),
     ({"max_completion_tokens": 0}, "found max_tokens 8, max_completion_tokens 0:")],
)
def test_a_reply_has_a_longest_length(extra_body, found):
    with pytest.raises(ConfigError, match=found):
        make_request(extra_body=extra_body)
    assert worst_tokens(make_request(extra_body={"max_completion_tokens": 7})).completion == 8


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [("gpt-4", "gpt-4", True), ("gpt-4", "gpt-4-0314", True), ("gpt-4o", "gpt-4o-2024-08-06", True),
     ("gpt-4", "gpt-4o", False), ("gpt-4", "gpt-4-turbo-2024-04-09", False), ("gpt-4-0314", "gpt-4", False),
     ("gpt-4", "", False), ("a", "b", True), ("gpt-4", "gpt-4-32k", False), ("gpt-4", "gpt-4-1106-preview", False),
     ("claude-3", "claude-3-5-sonnet-20240620", False), ("llama-3", "llama-3-8b", False),
     ("claude-3-opus", "claude-3-opus@20240229", True), ("gemini", "gemini-202401", True)],
)
def test_a_model_is_itself_or_a_version_of_it(asked, answered, same):
    assert is_same_model(asked, answered, accept_models=["b"]) is same


# cache


def test_a_reply_is_found_again_with_its_endpoint(tmp_path):
    with pytest.raises(OSError, match="too late"):
        closed = ReplyCache(tmp_path / "c")
        closed.close()
        closed.put(make_request(), REPLY, "http://a/v1")
    cache = ReplyCache(tmp_path / "c")
    odd = replace(REPLY, text="half a character \ud83d, a line\nand é")
    cache.put(make_request(1), REPLY, "http://a/v1")
    cache.put(make_request(2), odd, "http://b/v1")
    cache.close()
    for writable in (True, False):
        again = ReplyCache(tmp_path / "c", writable)
        assert len(again) == 2 and make_request(3).key() not in again
        assert again.get(make_request(1).key()) == (replace(REPLY, cached=True), "http://a/v1")
        assert again.get(make_request(2).key()) == (replace(odd, cached=True), "http://b/v1")
        again.close()
    entry = json.loads((tmp_path / "c" / REPLIES_FILE).read_text().splitlines()[1])
    assert entry["request"] == {"attempt": 0, "body": make_request(1).body()}


def test_every_cut_of_the_last_line_loses_that_line_only(tmp_path):
    file = tmp_path / REPLIES_FILE
    cache = ReplyCache(tmp_path)
    cache.put(make_request(1), REPLY, "u")
    kept = file.stat().st_size
    cache.put(make_request(2), REPLY, "u")
    cache.close()
    whole = file.read_bytes()
    for size in (kept + 1, kept + 50, len(whole) - 2):
        file.write_bytes(whole[:size])
        said = []
        cut = ReplyCache(tmp_path, log=said.append)
        assert make_request(1).key() in cut and make_request(2).key() not in cut
        assert cut.num_damaged == 1 and "1 lines cannot be read" in said[0]
        cut.put(make_request(2), REPLY, "u")
        cut.put(make_request(3), REPLY, "u")
        cut.close()
        again = ReplyCache(tmp_path, log=said.append)
        assert len(again) == 3 and again.get(make_request(3).key()).reply.text == "Yes."
        again.close()
    file.write_bytes(whole[:-1])  # only the end of the line is missing
    healed = ReplyCache(tmp_path)
    assert len(healed) == 2 and healed.num_damaged == 0
    healed.put(make_request(3), REPLY, "u")
    healed.close()
    assert len(ReplyCache(tmp_path, writable=False)) == 3


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_cut_off_when_it_was_new_is_new(tmp_path, size):
    ReplyCache(tmp_path).close()
    file = tmp_path / REPLIES_FILE
    header = file.read_bytes()
    file.write_bytes(header[:size])
    ReplyCache(tmp_path).close()
    assert file.read_bytes() == header


def test_what_is_no_reply_is_counted_and_asked_again(tmp_path):
    cache = ReplyCache(tmp_path)
    cache.put(make_request(), REPLY, "u")
    cache.close()
    file = tmp_path / REPLIES_FILE
    header, line = file.read_text().splitlines()
    entry = json.loads(line)
    del entry["base_url"]
    file.write_text(f"{header}\n{json.dumps(entry)}\n{'[' * 200_000}\n")
    cut = ReplyCache(tmp_path, writable=False, log=lambda line: None)
    assert len(cut) == 0 and cut.num_damaged == 2


def test_a_foreign_file_is_left_alone(tmp_path):
    (tmp_path / REPLIES_FILE).write_text('{"outputs": {}}\n')
    for _ in range(2):  # the lock is let go, too
        with pytest.raises(DataError, match="is no file of replies"):
            ReplyCache(tmp_path)
    assert (tmp_path / REPLIES_FILE).read_text() == '{"outputs": {}}\n'


def test_one_writer_at_a_time_and_readers_beside_it(tmp_path):
    writer = ReplyCache(tmp_path)
    writer.put(make_request(), REPLY, "u")
    with pytest.raises(ConfigError, match=r"is being written by process \d+"):
        ReplyCache(tmp_path)
    assert len(ReplyCache(tmp_path, writable=False)) == 1
    writer.close()
    ReplyCache(tmp_path).close()


def test_a_dry_run_creates_nothing(tmp_path):
    assert len(ReplyCache(tmp_path / "c", writable=False)) == 0
    assert not (tmp_path / "c").exists()


# budget, pace, waits


def test_what_is_set_aside_counts_until_it_is_settled():
    account = Account(Budget(Prices(1e6, 2e6), max_cost_usd=10.0))  # a dollar a prompt token, two a completion token
    assert account.reserve(Tokens(4, 1))
    results = []
    waiting = threading.Thread(target=lambda: results.append(account.reserve(Tokens(4, 1))))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()  # 12 dollars are too many, if the first call takes its 6
    account.settle(Tokens(4, 1), Tokens(2, 1))
    waiting.join(5)
    assert results == [True]
    account.settle(Tokens(4, 1), Tokens(4, 1))
    assert not account.reserve(Tokens(1, 0))
    assert not account.reserve(Tokens(0, 0))  # spent is spent, so that all that follows is told the same


def test_calls_at_one_time_never_exceed_the_cap():
    account, taken, mutex = Account(Budget(max_total_tokens=1000)), [], threading.Lock()

    def spend() -> None:
        while account.reserve(Tokens(30, 7)):
            with mutex:
                taken.append(25)
            account.settle(Tokens(30, 7), Tokens(20, 5))

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sum(taken) == 975  # the last reservation would have needed 1012


def test_costs_are_unknown_without_prices():
    assert Prices(1.0, 2.0).cost_usd(Tokens(3, 4)) == pytest.approx(11e-6)
    assert Prices(1.0).cost_usd(Tokens(3, 0)) == pytest.approx(3e-6)
    assert Prices(0.0, 0.0).cost_usd(Tokens(3, 4)) == Prices().cost_usd(Tokens(0, 0)) == 0.0
    assert Prices(1.0).cost_usd(Tokens(3, 4)) is None is Prices().cost_usd(Tokens(0, 1))
    assert not Account(Budget(Prices(1.0), max_cost_usd=5.0)).reserve(Tokens(3, 4))


def test_calls_are_spread_over_the_minute():
    clock = [100.0]
    pace = Pace(Limits(requests_per_minute=60, tokens_per_minute=600), now=lambda: clock[0])
    assert [pace.take(5), pace.take(5), pace.take(30), pace.take(5)] == [0, 1, 2, 5]
    clock[0] = 200.0
    assert pace.take(5) == 0
    assert Pace(Limits()).take(10**9) == 0


def test_back_off_doubles_to_its_limit_and_a_server_is_taken_at_its_word():
    policy = RetryPolicy(first_wait_s=1.0, max_wait_s=5.0)
    assert [policy.wait_s(n, None, jitter=0.0) for n in (1, 2, 3, 4, 50)] == [0.5, 1.0, 2.0, 2.5, 2.5]
    assert policy.wait_s(3, None, jitter=0.5) == 3.0
    assert policy.wait_s(3, retry_after_s=20.0, jitter=0.5) == 20.5


def test_retry_after_in_all_its_forms():
    assert read_retry_after({"retry-after": "7"}) == 7
    assert read_retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert read_retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < read_retry_after({"retry-after": later}) <= 100
    assert [read_retry_after(headers) for headers in ({}, {"retry-after": "soon"})] == [None, None]


# the bodies of responses


def test_a_reply_in_parts_is_read():
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]
    body = reply_body(parts, usage={"prompt_tokens": 10, "completion_tokens": 2})
    assert read_reply(make_request(), json.dumps(body)) == (ChatReply("Hi!", "m", "stop", "r", 10, 2), False)


def test_a_name_with_half_a_character_can_be_written():
    body = reply_body("half \ud83d", model="m-0613", id="r\ud83d")
    body["choices"][0]["finish_reason"] = "\ud83d"
    reply = read_reply(make_request(), json.dumps(body)).reply
    assert (reply.text, reply.response_id, reply.finish_reason) == ("half \ud83d", r"r\ud83d", r"\ud83d")
    with pytest.raises(Fault, match="^wrong_model"):
        read_reply(make_request(), json.dumps(reply_body(model="m\ud83d")))
    assert read_reply(make_request(), json.dumps(reply_body(model="m\ud83d")), [r"m\ud83d"]).reply.model == r"m\ud83d"


@pytest.mark.parametrize("count", [10**400, -1, True, 1.5, None])
def test_a_count_that_is_none_is_estimated(count):
    body = reply_body(usage={"prompt_tokens": count, "completion_tokens": 1})
    reply, is_estimated = read_reply(make_request(), json.dumps(body))
    assert is_estimated and (reply.prompt_tokens, reply.completion_tokens) == (3 + 8, 1)


@pytest.mark.parametrize("content", [5, {"text": "Hi"}, ["Hi"], [{"type": "text"}]])
def test_what_cannot_be_read_says_what_it_took(content):
    for usage, paid in (({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)), (None, None)):
        with pytest.raises(Fault, match="^bad_json: ") as raised:
            read_reply(make_request(), json.dumps(reply_body(content, usage=usage)))
        assert raised.value.paid == paid and raised.value.may_be_paid


def test_a_body_without_end_is_a_fault():
    with pytest.raises(Fault, match="^bad_json: not JSON"):
        read_reply(make_request(), "[" * 200_000)


# faults over HTTP


@pytest.mark.parametrize(
    ("fault", "kind", "paid", "lost"),
    [("http_429", "http_429", 1, 0), ("http_500", "http_500", 1, 0), ("http_408", "http_408", 1, 1),
     ("http_409", "http_409", 1, 0), ("http_502", "http_502", 1, 1), ("http_503", "http_503", 1, 0),
     ("http_504", "http_504", 1, 1), ("timeout", "timeout", 1, 1),
     ("connection", "connection", 1, 1), ("bad_json", "bad_json", 1, 1), ("no_choices", "bad_json", 2, 0),
     ("wrong_model", "wrong_model", 2, 0)],
)
def test_what_passes_is_tried_again(tmp_path, fault, kind, paid, lost):
    with fault_proxy(echo, fault_frac=1, faults=[fault], max_faults=1) as proxy:
        with make_client(tmp_path, proxy.base_url, timeout_s=0.3) as client:
            (outcome,) = client.ask([make_request()])
    assert outcome.problem is None and outcome.reply.text == "To Question 0?"
    report = client.report.to_json()
    assert report["faults"] == {kind: 1}
    assert (report["calls"], report["paid_calls"], report["lost_calls"]) == (2, paid, lost)
    assert report["prompt_tokens"] == 35 * paid
    assert report["max_lost_tokens"] == lost * sum(worst_tokens(make_request()))


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("http_500", r"gave up: http_500: .*\(try 3\)"), ("http_400", "refused: http_400: .*made to fail"),
     ("http_422", "refused: http_422"), ("http_413", "refused: http_413")],
)
def test_what_does_not_pass_ends_its_request_only(tmp_path, fault, problem):
    with fault_proxy(echo, fault_frac=0.5, faults=[fault], seed=3) as proxy:
        with make_client(tmp_path, proxy.base_url, retries=replace(QUICK, max_tries=3)) as client:
            outcomes = list(client.ask([make_request(n) for n in range(40)]))
    failed = [outcome for outcome in outcomes if outcome.problem]
    assert 0 < len(failed) < 40 and len({outcome.request.id for outcome in outcomes}) == 40
    for outcome in failed:
        assert outcome.reply is None
        assert re.match(problem, outcome.problem), outcome.problem
    assert client.report.to_json()["problems"] == {problem.partition(":")[0]: len(failed)}


@pytest.mark.parametrize(
    "fault", ["http_401", "http_402", "http_403", "http_404", "insufficient_quota", "wrong_model", "login_page"]
)
def test_what_nobody_would_get_ends_the_run(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with fault_proxy(echo, fault_frac=1, faults=[fault]) as proxy:
        with make_client(tmp_path, proxy.base_url, api_key_env="SOME_KEY") as client:
            with pytest.raises(ConfigError, match=proxy.base_url) as error:
                list(client.ask(make_request(n) for n in range(1000)))
    assert {"wrong_model": "--accept-model", "login_page": "--base-url"}.get(fault, "SOME_KEY") in str(error.value)
    assert "Bearer <key>" in str(error.value) or fault == "wrong_model"
    assert "sk-secret" not in str(error.value) and not any(b"sk-secret" in f.read_bytes() for f in tmp_path.iterdir())
    assert proxy.totals().total() < 50


def test_an_odd_answer_to_an_odd_request_does_not_end_the_run(tmp_path):
    """Not the first of a run, either, nor one of a run whose other replies are in the cache."""

    def answer(body: dict) -> dict | str:
        return {"error": "moderated"} if body["messages"][-1]["content"] == "Question 0?" else "Fine."

    with fault_proxy(answer) as proxy:
        for num_paid in (3, 0):
            with make_client(tmp_path, proxy.base_url, concurrency=1) as client:
                outcomes = list(client.ask([make_request(n) for n in range(4)]))
            assert [bool(outcome.reply) for outcome in outcomes] == [False, True, True, True]
            assert outcomes[0].problem.startswith("gave up: bad_json: ")
            assert client.report.counts["paid_calls"] == num_paid
        with make_client(tmp_path, proxy.base_url, concurrency=1) as client:
            outcomes = list(client.ask([make_request(n) for n in (1, 0)] + [make_request(0, seed=n) for n in range(5)]))
    assert [bool(outcome.reply) for outcome in outcomes] == [True] + [False] * 6


def test_a_reply_without_text_is_paid_once_and_asked_again(tmp_path):
    def check(request, reply):
        return None if reply.text else f"empty: {reply.finish_reason}"

    with fault_proxy(echo, fault_frac=1, faults=["empty_reply"]) as proxy:
        for num_paid in (3, 0):
            with make_client(tmp_path, proxy.base_url) as client:
                (outcome,) = client.ask([make_request(seed=7)], check, max_attempts=3)
            assert outcome.problem == "rejected: empty: length" and len(outcome.rejected) == 3
            assert (client.report.counts["paid_calls"], client.report.faults) == (num_paid, {})
    assert len(proxy.answered) == 3  # a seed each


def test_caps_take_the_bound_of_a_reply_without_token_counts(tmp_path):
    requests = [make_request(n) for n in range(9)]
    worst = sum(worst_tokens(requests[0]))
    with fault_proxy(lambda body: reply_body()) as proxy:
        budget = Budget(max_total_tokens=2 * worst)
        with make_client(tmp_path, proxy.base_url, budget, concurrency=1) as client:
            outcomes = list(client.ask(requests))
    assert [outcome.problem for outcome in outcomes] == [None, None, *["budget"] * 7]
    assert "24 tokens, no prices given (estimated for 2 replies" in client.report.summary().replace("22 + 2", "24")


def test_an_endpoint_that_is_not_there_costs_nothing(tmp_path):
    with make_client(tmp_path, budget=Budget(max_total_tokens=200)) as client:
        outcomes = list(client.ask([make_request(n) for n in range(8)]))
    assert all(outcome.problem.startswith("gave up: connection: ConnectError") for outcome in outcomes)
    assert client.report.to_json()["lost_calls"] == 0


def test_half_a_character_is_refused_and_the_others_go_on(tmp_path):
    bad = replace(make_request(1), messages=(Message("user", "\ud83d"),))
    with fault_proxy(echo) as proxy, make_client(tmp_path, proxy.base_url) as client:
        outcomes = {outcome.request.id: outcome for outcome in client.ask([make_request(0), bad])}
    assert outcomes["q0"].problem is None
    assert outcomes["q1"].problem.startswith("refused: not_sent")


def test_a_key_goes_to_the_endpoint_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        Endpoint().read_key()
    endpoint = Endpoint("https://user:pass@host:1/v1?api-key=x")
    assert endpoint.public_url == "https://host:1/v1" and endpoint.read_key() == ""
    for url in ("localhost:8000", "http://[::1/v1", "http://user:pass@host:99999/v1"):
        with pytest.raises(ConfigError, match="is no address") as raised:
            Endpoint(url)
        assert "pass" not in str(raised.value)


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk one", "\u201csk\u201d", '"sk"', "sk-\x7f"])
def test_what_is_no_key_is_not_told(monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ConfigError, match="SOME_KEY holds no key") as raised:
        Endpoint("http://h/v1", "SOME_KEY").read_key()
    assert "sk" not in str(raised.value)
    monkeypatch.setenv("SOME_KEY", " sk-Az09_./+=:~\n")
    assert Endpoint("http://h/v1", "SOME_KEY").read_key() == "sk-Az09_./+=:~"


# whole runs


def test_replies_are_checked_asked_again_and_kept(tmp_path):
    requests = [make_request(n, seed=7) for n in range(9)]

    def check(request, reply):
        if request.id == "q2":
            return "never good"
        return None if request.attempt or request.id != "q1" else "too short"

    with fault_proxy(echo) as proxy:
        for cached in (False, True):
            with make_client(tmp_path, proxy.base_url) as client:
                outcomes = {outcome.request.id: outcome for outcome in client.ask(requests, check, max_attempts=3)}
            assert len(outcomes) == 9
            assert outcomes["q1"].request.attempt == 1 and outcomes["q1"].rejected[0][1] == "too short"
            assert outcomes["q1"].reply.cached is cached
            assert outcomes["q2"].problem == "rejected: never good" and len(outcomes["q2"].rejected) == 3
            report = client.report.to_json()
            assert report["attempts"] == {
                "0": {"accepted": 7, "rejected": 2}, "1": {"accepted": 1, "rejected": 1}, "2": {"rejected": 1},
            }
            assert (report["from_cache"], report["paid_calls"]) == ((12, 0) if cached else (0, 12))
            assert report["problems"] == {"rejected": 1}
    assert proxy.totals() == {"good": 12}
    for outcome in outcomes.values():
        if outcome.reply:
            assert outcome.reply.response_id == response_id(body_hash(outcome.request.body()))


def test_requests_that_are_the_same_are_paid_once(tmp_path):
    requests = [replace(make_request(n // 10), id=f"r{n}") for n in range(40)]

    def slowly(body):
        time.sleep(0.05)
        return echo(body)

    with fault_proxy(slowly) as proxy, make_client(tmp_path, proxy.base_url, concurrency=8) as client:
        outcomes = list(client.ask(requests))
    assert {outcome.request.id for outcome in outcomes} == {request.id for request in requests}
    assert proxy.totals() == {"good": 4}
    report = client.report.to_json()
    assert report["from_cache"] + report["shared"] == 36 and report["shared"] > 0


def test_replies_of_another_endpoint_are_taken_and_counted(tmp_path):
    for _ in range(2):
        with fault_proxy(echo) as proxy, make_client(tmp_path, proxy.base_url) as client:
            list(client.ask([make_request()]))
    assert client.report.to_json()["from_other_endpoint"] == 1
    assert proxy.totals() == {}


def test_a_spent_budget_says_so_and_the_cache_goes_on_to_answer(tmp_path):
    requests = [make_request(n) for n in range(30)]
    with fault_proxy(echo) as proxy:
        budget = Budget(Prices(1.0, 10.0), max_cost_usd=10 * 65e-6)  # a reply costs 35 + 3 tokens: 65e-6 dollars
        with make_client(tmp_path, proxy.base_url, budget) as client:
            outcomes = list(client.ask(requests))
        assert len(outcomes) == 30
        num_good = sum(outcome.problem is None for outcome in outcomes)
        assert {outcome.problem for outcome in outcomes} == {None, "budget"}
        assert client.report.cost_usd <= budget.max_cost_usd
        worst = Prices(1.0, 10.0).cost_usd(worst_tokens(requests[0]))
        assert num_good == proxy.totals()["good"] >= (budget.max_cost_usd - worst) // 65e-6
        with make_client(tmp_path, proxy.base_url, Budget(max_total_tokens=0)) as client:
            outcomes = list(client.ask(reversed(requests)))
        assert sum(outcome.problem is None for outcome in outcomes) == num_good


def test_what_a_check_raises_is_raised_and_what_was_paid_is_kept(tmp_path):
    def check(request, reply):
        raise KeyError(request.id)

    with fault_proxy(echo) as proxy, make_client(tmp_path, proxy.base_url, log=lambda line: None) as client:
        with pytest.raises(KeyError, match="q"):
            list(client.ask([make_request(n) for n in range(50)], check))
        assert 0 < len(client.cache) == proxy.totals()["good"] < 50


def test_leaving_early_keeps_what_was_in_flight(tmp_path):
    said = []
    with fault_proxy(echo) as proxy, make_client(tmp_path, proxy.base_url, log=said.append) as client:
        outcomes = client.ask(make_request(n) for n in range(1000))
        next(outcomes)
        outcomes.close()
        assert 0 < len(client.cache) == proxy.totals()["good"] < 50
    assert "ending early" in said[0]


def test_an_error_in_the_loop_over_outcomes_loses_nothing(tmp_path):
    with fault_proxy(echo) as proxy:
        with pytest.raises(ZeroDivisionError):
            with make_client(tmp_path, proxy.base_url, log=lambda line: None) as client:
                outcomes = client.ask(make_request(n) for n in range(1000))
                for _ in outcomes:
                    raise ZeroDivisionError
        cache = ReplyCache(tmp_path, writable=False)
        assert 0 < len(cache) == proxy.totals()["good"] < 50


def test_a_wait_that_is_too_long_is_not_begun(tmp_path):
    with fault_proxy(echo, fault_frac=1, faults=["http_429"]) as proxy:
        with make_client(tmp_path, proxy.base_url, retries=RetryPolicy(max_total_wait_s=0.0)) as client:
            (outcome,) = client.ask([make_request()])
    assert outcome.problem.startswith("gave up: http_429: ") and outcome.problem.endswith("(try 1)")


def test_a_dry_run_counts_and_asks_nothing(tmp_path):
    requests = [make_request(n % 5) for n in range(20)]
    cache = ReplyCache(tmp_path)
    cache.put(requests[0], REPLY, "u")
    cache.close()
    cache = ReplyCache(tmp_path, writable=False)
    found = estimate(requests, cache, Prices(1.0, 10.0))
    # 4 calls: 11 bytes are 3 tokens and 8 for the message, or 11 and 72 at worst.
    assert (found.calls, found.calls_in_cache, found.prompt_tokens, found.max_completion_tokens) == (5, 1, 44, 32)
    assert found.cost_usd == pytest.approx(364e-6) and found.max_cost_usd == pytest.approx(652e-6)
    assert found.summary().startswith("5 calls, 1 of them in the cache")
    client = ChatClient(Endpoint("http://127.0.0.1:9/v1"), cache, Budget(), Limits(), QUICK)
    with pytest.raises(ConfigError, match="dry run"):
        client.ask(requests)
