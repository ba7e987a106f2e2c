"""A live model behind a proxy that fails on purpose: every request has one outcome, and no reply is paid twice."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_ds.api.budget import Budget, Prices
from llava_ds.api.cache import ReplyCache
from llava_ds.api.client import ChatClient
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.limits import Limits
from llava_ds.api.messages import ChatRequest, Message
from llava_ds.api.retries import RetryPolicy
from tests.helpers.chat_server import MODEL, serve_chat
from tests.helpers.fault_proxy import FAULTS, PAID_AND_LOST, body_hash, fault_proxy, response_id

pytestmark = pytest.mark.slow
PRICES = Prices(1.0, 10.0)
CONCURRENCY = 16


def make_requests(count: int, first: int = 0) -> list[ChatRequest]:
    return [
        ChatRequest(f"q{n}", MODEL, (Message("user", f"Name {n}?"),), 4, seed=n) for n in range(first, first + count)
    ]


def make_client(folder: Path, base_url: str, timeout_s: float = 4.0, concurrency: int = CONCURRENCY) -> ChatClient:
    return ChatClient(
        Endpoint(base_url, timeout_s=timeout_s), ReplyCache(folder), Budget(PRICES), Limits(concurrency),
        RetryPolicy(max_tries=10, first_wait_s=0.05),
    )


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """50 requests that reach the live model through the proxy, and its replies."""
    folder = tmp_path_factory.mktemp("live")
    requests = make_requests(50)
    with serve_chat() as upstream, fault_proxy(upstream, record=folder / "replies.jsonl") as proxy:
        with make_client(folder / "cache", proxy.base_url, timeout_s=120, concurrency=2) as client:
            outcomes = list(client.ask(requests))
    assert {outcome.request.id for outcome in outcomes} == {request.id for request in requests}
    assert len(outcomes) == 50 and all(outcome.problem is None for outcome in outcomes)
    assert proxy.totals() == {"good": 50} and not proxy.paid_twice()
    report = client.report.to_json()
    assert (report["calls"], report["paid_calls"], report["num_estimated"]) == (50, 50, 0)
    assert report["models"] == {MODEL: 50}
    assert report["prompt_tokens"] == sum(outcome.reply.prompt_tokens for outcome in outcomes) > 50 * 20
    assert len({outcome.reply.response_id for outcome in outcomes}) == 50
    return folder / "replies.jsonl"


def test_a_thousand_requests_under_faults(recording, tmp_path):
    requests = make_requests(1000)
    with fault_proxy(recording, fault_frac=0.2, seed=1, hang_s=6.0) as proxy:
        with make_client(tmp_path, proxy.base_url) as client:
            outcomes = list(client.ask(requests))
    assert sorted(outcome.request.id for outcome in outcomes) == sorted(request.id for request in requests)
    assert all(outcome.problem is None for outcome in outcomes)
    new = [outcome for outcome in outcomes if int(outcome.request.id[1:]) >= 50]
    assert len(new) == 950
    for outcome in new:
        assert outcome.reply.response_id == response_id(body_hash(outcome.request.body()))

    totals, report = proxy.totals(), client.report.to_json()
    assert totals["good"] == 1000 and not proxy.paid_twice()
    assert all(totals[kind] > 10 for kind in FAULTS)
    assert report["faults"] == {kind: totals[kind] for kind in sorted(FAULTS)}
    assert report["calls"] == totals.total()
    assert report["paid_calls"] == 1000 + totals["wrong_model"]
    assert report["lost_calls"] == proxy.num_lost() == sum(totals[kind] for kind in PAID_AND_LOST)
    assert (report["requests"], report["accepted"], report["problems"]) == (1000, 1000, {})
    assert report["cost_usd"] == pytest.approx(
        (report["prompt_tokens"] + 10 * report["completion_tokens"]) / 1e6
    )
    with make_client(tmp_path, "http://127.0.0.1:9/v1") as client:  # all again, and nobody is asked
        assert all(outcome.reply.cached for outcome in client.ask(requests))
    assert client.report.to_json()["from_cache"] == client.report.to_json()["from_other_endpoint"] == 1000


def ask_in_a_process(folder: Path, base_url: str, count: int) -> subprocess.Popen:
    code = (
        # What starts the tests in the background may have told their processes to ignore Ctrl-C.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from tests.e2e.test_api_under_faults import make_client, make_requests\n"
        "with make_client(Path(sys.argv[1]), sys.argv[2]) as client:\n"
        "    for _ in client.ask(make_requests(int(sys.argv[3]))): pass\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), base_url, str(count)], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=Path(__file__).parents[2],
    )


def wait_for_good(proxy, count: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        if proxy.totals()["good"] >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{proxy.totals()} after 30 s")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_ended_in_the_middle_only_what_is_missing_is_asked(recording, tmp_path, end):
    requests = make_requests(400)
    with fault_proxy(recording, fault_frac=0.2, seed=2, hang_s=6.0) as proxy:
        process = ask_in_a_process(tmp_path, proxy.base_url, len(requests))
        wait_for_good(proxy, 100, process)
        process.send_signal(end)
        process.communicate(timeout=20)
        assert process.returncode in (-end, 1, 130) and process.returncode != 0
        good_before = {name for name, kinds in proxy.answered.items() if kinds["good"]}

        cache = ReplyCache(tmp_path)
        kept = {body_hash(request.body()) for request in requests if request.key() in cache}
        cache.close()
        assert kept <= good_before and 100 - CONCURRENCY <= len(kept) < 400
        # What was on the way when the process was killed is lost; Ctrl-C waits for it.
        assert len(good_before - kept) <= (CONCURRENCY if end == signal.SIGKILL else 0)

        asked_before = {name: kinds.total() for name, kinds in proxy.answered.items()}
        with make_client(tmp_path, proxy.base_url) as client:
            outcomes = list(client.ask(requests))
    assert sorted(outcome.request.id for outcome in outcomes) == sorted(request.id for request in requests)
    assert all(outcome.problem is None for outcome in outcomes)
    asked = {name for name, kinds in proxy.answered.items() if kinds.total() > asked_before.get(name, 0)}
    assert asked == {body_hash(request.body()) for request in requests} - kept
    assert set(proxy.paid_twice()) == good_before - kept
    assert client.report.to_json()["from_cache"] == len(kept)
