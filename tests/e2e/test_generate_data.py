"""tools/generate_data with a live small model, under faults, under kill -9, and on to the doctor and stage 2."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_ds.datagen.records import AnnotatedImage
from llava_ds.distributed import free_port
from llava_ds.metrics.trackers import read_metrics
from llava_ds.quickstart.prepare import prepare
from tests.helpers.chat_server import MODEL, serve_chat
from tests.helpers.data_writer import kind_of, make_images, words_of, write_reply, write_small_prompts
from tests.helpers.fault_proxy import FAULTS, PAID_AND_LOST, FaultProxy, body_hash, fault_proxy

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NUM_LIVE, MIN_LIVE_ACCEPTED = 50, 40
NO_LOOPS = '{"dry_multiplier": 0.8}'  # llama.cpp's penalty on repeated words, without which half of all replies loop
CONCURRENCY = 16


def command(records: Path, out: Path, base_url: str, *options: object) -> list[str]:
    """The command as a user starts it."""
    tool = [sys.executable, str(ROOT / "tools" / "generate_data"), str(records), str(out), "--model", MODEL]
    return [*tool, "--base-url", base_url, *map(str, options)]


def run(*arguments: object, exit_code: int = 0) -> str:
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=1800)
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_jsonl(file: Path, images: list[AnnotatedImage]) -> Path:
    file.write_text("".join(
        json.dumps({
            "id": image.id, "image": image.image, "captions": image.captions,
            "instances": [{"category": thing.category, "bbox": thing.box} for thing in image.instances],
        }) + "\n"
        for image in images
    ))
    return file


def each_sample_once(out: Path, num_samples: int) -> tuple[list[str], list[str]]:
    """The ids of the samples that were written and of those that were not: together all, none twice."""
    written = [record["id"] for record in json.loads((out / "data.json").read_text())]
    lost = [line["id"] for line in read_lines(out / "rejects.jsonl") if not line["produced"]]
    assert len({*written, *lost}) == len(written) + len(lost) == num_samples
    assert [line["id"] for line in read_lines(out / "provenance.jsonl")] == written
    assert (out / "COMPLETE").is_file()
    return written, lost


@pytest.fixture(scope="module")
def prepared() -> Path:
    return prepare(lambda _: None)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_small_prompts(tmp_path_factory.mktemp("prompts") / "small")


@pytest.fixture(scope="module")
def live(prepared, prompts, tmp_path_factory) -> tuple[Path, Path]:
    """The folder that the live model filled from the quickstart's scenes, and its replies."""
    folder = tmp_path_factory.mktemp("live")
    scenes = folder / "scenes.jsonl"
    scenes.write_bytes((prepared / "scenes.jsonl").read_bytes())
    with serve_chat(num_threads=2) as upstream, fault_proxy(upstream, record=folder / "replies.jsonl") as proxy:
        print(run(*command(
            scenes, folder / "out", proxy.base_url, "--prompts", prompts, "--num-samples", NUM_LIVE, "--reply-grammar",
            "--concurrency", 2, "--max-tokens", 400, "--timeout-s", 600,
            "--extra-body", NO_LOOPS,
        )))
        assert proxy.totals()["good"] >= NUM_LIVE and not proxy.paid_twice()
    return folder / "out", folder / "replies.jsonl"


def test_scenes_through_a_live_model_and_the_doctor(live, prepared):
    out, _ = live
    written, _ = each_sample_once(out, NUM_LIVE)
    assert len(written) >= MIN_LIVE_ACCEPTED
    report = json.loads((out / "report.json").read_text())
    (this_run,) = report["runs"]
    assert this_run["models"] == {MODEL: this_run["paid_calls"]} and this_run["num_estimated"] == 0
    kinds = Counter(sample_id.rpartition("-")[2] for sample_id in written)
    assert report["produced"] == kinds and min(kinds.values()) >= 5
    text = run(sys.executable, ROOT / "tools/doctor", out / "data.json", "--image-root", prepared,
               "--tokenizer", prepared / "llm", "--template", "short", "--num-patches", 36)
    print(text)


def test_stage_2_trains_on_it(live, prepared, tmp_path):
    """A few steps of the quickstart's recipe on what the live model wrote."""
    settings = {
        "model.init_from": "null", "data.path": str(live[0] / "data.json"), "data.image_root": str(prepared),
        "data.feature_cache": "null", "train.max_steps": "3", "train.global_batch_size": "8",
        "train.micro_batch_size": "4",
    }
    launcher = Path(sys.executable).parent / "deepspeed"
    run(
        launcher, "--num_accelerators", 1, "--master_port", free_port(), ROOT / "llava_ds/train.py", "--deepspeed",
        ROOT / "ds_configs/zero3.json", "--recipe", "quickstart_stage2", "--run-dir", tmp_path / "run",
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    )
    metrics = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    # The first step's rate is 0 and the second meets the same weights: only the third has learned.
    assert len(metrics) == 3 and 0 < metrics[2]["loss"] < min(metrics[0]["loss"], metrics[1]["loss"])
    assert list((tmp_path / "run/checkpoints").glob("step-*/COMPLETE"))


def replay(replies: Path, spoil_frac: float = 0.0) -> Callable[[dict], str]:
    """Answers with recorded replies of the kind that is asked for, each with a last sentence of its own.

    ``spoil_frac`` of the requests get one that has to be refused.
    """
    recorded: dict[str, list[str]] = {}
    for entry in read_lines(replies):
        text = entry["reply"]["choices"][0]["message"]["content"]
        recorded.setdefault(kind_of(entry["request"]), []).append(text)

    def answer(body: dict) -> str:
        number = int(body_hash(body), 16)
        texts = recorded[kind_of(body)]
        spoiled = " The caption says so." if number % 1000 < 1000 * spoil_frac else ""
        return f"{texts[number // 1000 % len(texts)]} It stands near {words_of(body)}.{spoiled}"

    return answer


def test_a_thousand_samples_under_faults(live, prompts, tmp_path):
    records = write_jsonl(tmp_path / "records.jsonl", make_images(510))
    with fault_proxy(replay(live[1], 0.1), fault_frac=0.2, seed=1, hang_s=6.0) as proxy:
        run(*command(
            records, tmp_path / "out", proxy.base_url, "--prompts", prompts, "--num-samples", 1000, "--max-attempts", 4,
            "--concurrency", CONCURRENCY, "--timeout-s", 4, "--max-tries", 12, "--price-in", 1, "--price-out", 10,
        ))
    written, lost = each_sample_once(tmp_path / "out", 1000)
    assert len(written) > 900
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["planned"] == {"conversation": 367, "detail": 146, "complex": 487}
    assert sum(report["produced"].values()) == len(written) and sum(report["rejected"].values()) == len(lost)
    rejects = read_lines(tmp_path / "out" / "rejects.jsonl")
    num_refused = sum(len(line["replies"]) for line in rejects)
    assert report["refused_replies"]["speaks of captions or boxes"] > 50
    assert sum(report["refused_replies"].values()) == num_refused

    totals, this_run = proxy.totals(), report["runs"][-1]
    assert not proxy.paid_twice()
    assert totals["good"] == len(written) + num_refused  # each reply was paid once
    assert all(totals[kind] > 10 for kind in FAULTS)
    assert this_run["faults"] == {kind: totals[kind] for kind in sorted(FAULTS)}
    assert this_run["calls"] == totals.total()
    assert this_run["paid_calls"] == totals["good"] + totals["wrong_model"]
    assert this_run["lost_calls"] == sum(totals[kind] for kind in PAID_AND_LOST)
    lines = read_lines(tmp_path / "out" / "provenance.jsonl")
    ids = [response for line in lines for response in line["response_ids"]]
    ids += [reply["response_id"] for line in rejects if not line["produced"] for reply in line["replies"]]
    assert len(set(ids)) == len(ids) == totals["good"]


def wait_for(proxy: FaultProxy, count: int) -> None:
    deadline = time.monotonic() + 120
    while proxy.totals()["good"] < count:
        assert time.monotonic() < deadline, proxy.totals()
        time.sleep(0.02)


def test_kill_and_go_on(tmp_path):
    def slow(body: dict) -> str:
        time.sleep(0.05)
        return write_reply(body)

    records = write_jsonl(tmp_path / "records.jsonl", make_images(200))
    options = ("--num-samples", 300, "--concurrency", CONCURRENCY)
    with fault_proxy(slow) as proxy:
        for num_paid in (60, 180):
            started = subprocess.Popen(
                command(records, tmp_path / "out", proxy.base_url, *options), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_for(proxy, num_paid)
            started.kill()
            assert started.wait() == -9
            assert not (tmp_path / "out" / "COMPLETE").exists()
        run(*command(records, tmp_path / "out", proxy.base_url, *options))
        num_twice = len(proxy.paid_twice())
        assert num_twice <= 2 * CONCURRENCY  # in flight when it was killed
        assert proxy.totals()["good"] <= 300 + 2 * CONCURRENCY
        run(*command(records, tmp_path / "whole", proxy.base_url, *options))
    written, lost = each_sample_once(tmp_path / "out", 300)
    assert len(written) == 300 and not lost
    for name in ("data.json", "provenance.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.skipif("LLAVA_DS_BENCH_COCO" not in os.environ, reason="LLAVA_DS_BENCH_COCO names no folder")
def test_the_80_shared_records_and_the_doctor(live, prompts, tmp_path):
    records = tmp_path / "80.jsonl"
    records.write_bytes((Path(os.environ["LLAVA_DS_BENCH_COCO"]) / "caps_boxes_coco2014_val_80.jsonl").read_bytes())
    with fault_proxy(replay(live[1])) as proxy:
        run(*command(records, tmp_path / "out", proxy.base_url, "--prompts", prompts))
    written, _ = each_sample_once(tmp_path / "out", 164)  # 80 complex, 60 conversation, 24 detail
    assert len(written) >= 150
    report = tmp_path / "doctor.json"
    run(sys.executable, ROOT / "tools/doctor", tmp_path / "out/data.json", "--no-images", "--json", report)
    assert json.loads(report.read_text())["data"]["num_records"] == len(written)
