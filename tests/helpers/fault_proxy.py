"""An HTTP proxy in front of a chat endpoint that records, replays, fails on purpose, and counts what it answered.

It answers from a live upstream, from a recording without one, or from a function of the request. Which try of which
request fails, and how, is a pure function of (seed, hash of its body, number of the try).
"""

import hashlib
import json
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("http_429", "http_500", "timeout", "connection", "bad_json", "wrong_model")
"""What goes wrong by default; also known: any ``http_NNN``, ``insufficient_quota``, ``no_choices``, ``login_page``,
and ``empty_reply``, which is a reply of a model that was cut off before it said anything."""
PAID_AND_LOST = ("timeout", "connection", "bad_json")
"""Upstream has answered, and the client cannot know what."""
Answer = Callable[[dict], str | dict]
"""From a request's body to the reply, or to its text."""
PROMPT_TOKENS = 35
"""That a reply made here says it took."""


def body_hash(body: Mapping) -> str:
    """Of a request's JSON body, however it is written."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def chat_reply(text: str, model: str) -> dict:
    """A reply in the form of llama.cpp's server."""
    num_words = len(text.split())
    return {
        "choices": [{"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": text}}],
        "created": 1795979658, "model": model, "object": "chat.completion", "id": "chatcmpl-0",
        "usage": {
            "completion_tokens": num_words, "prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + num_words
        },
    }


@dataclass
class FaultProxy:
    """What a proxy does and did. ``answered``: by hash of a body, how often with ``good`` and with each fault."""

    source: "str | Path | Answer"
    record: Path | None = None
    fault_frac: float = 0.0
    faults: Sequence[str] = FAULTS
    max_faults: int | None = None
    seed: int = 0
    hang_s: float = 5.0
    base_url: str = ""
    answered: dict[str, Counter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mutex = threading.Lock()
        self.closing = threading.Event()
        self._recorded: list[dict] = []
        if isinstance(self.source, Path):
            self._recorded = [json.loads(line) for line in self.source.read_text().splitlines()]
            if not self._recorded:
                raise ValueError(f"{self.source} holds no recorded reply")

    def totals(self) -> Counter:
        """Answers of each kind."""
        with self._mutex:
            return sum(self.answered.values(), Counter())

    def paid_twice(self) -> list[str]:
        """Hashes of bodies that got more than one good answer."""
        with self._mutex:
            return [name for name, kinds in self.answered.items() if kinds["good"] > 1]

    def num_lost(self) -> int:
        """Answers that upstream gave and the client never read."""
        totals = self.totals()
        return sum(totals[kind] for kind in PAID_AND_LOST)

    def plan(self, name: str) -> str:
        """What the next try of a body gets."""
        with self._mutex:
            before = self.answered.setdefault(name, Counter())
            num_faults = before.total() - before["good"]
            draw = hashlib.sha256(f"{self.seed} {name} {before.total()}".encode()).digest()
            fails = int.from_bytes(draw[:4]) < self.fault_frac * 2**32
            if self.max_faults is not None and num_faults >= self.max_faults:
                fails = False
            kind = self.faults[int.from_bytes(draw[4:8]) % len(self.faults)] if fails else "good"
            before[kind] += 1
            return kind

    def reply(self, name: str, body: dict) -> tuple[int, bytes]:
        """Status and body of an answer without faults."""
        if callable(self.source):
            made = self.source(body)
            reply = {**(made if isinstance(made, dict) else chat_reply(made, body["model"])), "id": response_id(name)}
        elif isinstance(self.source, Path):
            reply = self._replay(name)
        else:
            return self._ask_upstream(name, body)
        return 200, json.dumps(reply).encode()

    def _replay(self, name: str) -> dict:
        """The recorded reply; for a body that was never asked one of the others, under an id of its own."""
        for entry in self._recorded:
            if entry["hash"] == name:
                return entry["reply"]
        return {**self._recorded[int(name, 16) % len(self._recorded)]["reply"], "id": response_id(name)}

    def _ask_upstream(self, name: str, body: dict) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"{self.source}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                status, data = response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        if self.record is not None:
            entry = {"hash": name, "request": body, "reply": json.loads(data)}
            with self._mutex, self.record.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return status, data


def response_id(name: str) -> str:
    """The id of a reply that was made for a body's hash."""
    return f"chatcmpl-{name[:24]}"


@contextmanager
def fault_proxy(source: "str | Path | Answer", **options) -> Iterator[FaultProxy]:
    """A running proxy on a free port; ``options`` are the fields of ``FaultProxy``.

    ``source``: an upstream's base URL, a file that ``record`` wrote, or an ``Answer``.
    """
    proxy = FaultProxy(source, **options)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = proxy
    proxy.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    block_on_close = False
    proxy: FaultProxy

    def handle_error(self, request, client_address) -> None:
        """Clients that went away are what this is for; all else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet a response: with two, the second waits for the client's late ACK
    server: _Server

    def do_POST(self) -> None:
        """One call."""
        proxy = self.server.proxy
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body_hash(body)
        kind = proxy.plan(name)
        if kind.startswith("http_") or kind == "insufficient_quota":
            self._refuse(kind, name)
            return
        status, data = proxy.reply(name, body)  # paid, whatever becomes of it
        if kind == "timeout":
            proxy.closing.wait(proxy.hang_s)
            self.close_connection = True
        elif kind == "connection":
            self._send(status, data, num_bytes=len(data) // 2)
            self.close_connection = True
        elif kind == "login_page":
            self._send(200, f"<html>Who is {self.headers['Authorization']}?</html>".encode())
        else:
            self._send(status, _spoil(data, kind))

    def _refuse(self, kind: str, name: str) -> None:
        status = 429 if kind == "insufficient_quota" else int(kind.removeprefix("http_"))
        error = {"error": {"message": self._complaint(kind), "type": kind, "code": kind}}
        retry_after = {"Retry-After": str(int(name, 16) % 2)} if kind == "http_429" else {}
        self._send(status, json.dumps(error).encode(), retry_after)

    def _complaint(self, kind: str) -> str:
        # Some servers repeat the key that they refuse.
        return f"made to fail with {kind}; you sent {self.headers['Authorization']}"

    def _send(
        self, status: int, data: bytes, headers: Mapping[str, str] | None = None, num_bytes: int | None = None
    ) -> None:
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:num_bytes])

    def log_message(self, *_: object) -> None:
        """Nothing: ``answered`` holds it."""


def _spoil(data: bytes, kind: str) -> bytes:
    if kind == "bad_json":
        return data[: len(data) // 2]
    reply = json.loads(data)
    if kind == "wrong_model":
        reply["model"] = "another-model"
    elif kind == "no_choices":
        reply["choices"] = []
    elif kind == "empty_reply":
        reply["choices"][0].update(finish_reason="length", message={"role": "assistant", "content": ""})
    return json.dumps(reply).encode()
