"""A judge on loopback whose scores are a function of what it is asked, so results can be worked out by hand."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("http_429", "http_500", "bad_json", "wrong_model")


def digest(*parts: object) -> int:
    """A number out of texts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def verdict(content: str, seed: int | None) -> str:
    """The reply: every seventh cannot be read; the others score each answer by its words, in one of a few forms."""
    number = digest(content, seed)
    if number % 7 == 0:
        return "I cannot say.\nBoth are fine."
    first, second = (
        1 + digest(content.partition(f"[Assistant {place}]\n")[2].partition("\n\n[End")[0], seed) % 10
        for place in (1, 2)
    )
    form = ("{} {}", "{}, {}", "{}/10 {}/10", "Assistant 1: {}\nAssistant 2: {}")[number % 4]
    return form.format(first, second) + "\nBecause."


class JudgeServer:
    """Counts what it was asked; ``names`` are its models' names in turn.

    ``faulty_frac`` of its requests meet one of ``FAULTS`` first, counted by kind; ``asked`` counts replies only.
    """

    def __init__(self, names: tuple[str, ...], faulty_frac: float) -> None:
        self.names = names
        self.faulty_frac = faulty_frac
        self.asked: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.url = ""

    def fault(self, body: dict[str, Any]) -> str | None:
        """The fault of a request that is seen for the first time, if it has one."""
        text = json.dumps(body, sort_keys=True)
        with self.lock:
            if text in self.seen or digest("faulty", text) % 1000 >= 1000 * self.faulty_frac:
                return None
            self.seen.add(text)
            fault = FAULTS[digest("fault", text) % len(FAULTS)]
            self.faults[fault] += 1
        return fault

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        with self.lock:
            name = self.names[self.asked.total() % len(self.names)]
            self.asked[json.dumps(body, sort_keys=True)] += 1
        text = verdict(body["messages"][-1]["content"], body.get("seed"))
        return {
            "id": f"chatcmpl-{digest(json.dumps(body)) % 10**8}", "object": "chat.completion", "created": 0,
            "model": name,
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }


@contextmanager
def serve_judge(*names: str, faulty_frac: float = 0.0) -> Iterator[JudgeServer]:
    """A server whose ``url`` goes to --base-url; its model is ``judge-1`` where no names are given."""
    judge = JudgeServer(names or ("judge-1",), faulty_frac)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = judge.fault(body)
            status = int(fault.removeprefix("http_")) if fault and fault.startswith("http_") else 200
            reply = {"http_429": b"{}", "http_500": b"oops", "bad_json": b'{"choices": [{'}.get(fault or "")
            if reply is None:
                reply = json.dumps(judge.answer(body) if fault is None else {"model": "other", "choices": [
                    {"finish_reason": "stop", "message": {"role": "assistant", "content": "1 10"}}
                ]}).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
