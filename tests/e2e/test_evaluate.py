"""tools/evaluate on ScienceQA and LLaVA-Bench: what is asked, what is written, and what is refused before."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image

from llava_ds.evaluation.scienceqa_questions import ANSWER_DIRECTLY
from llava_ds.inference.session import Sampling, load_session
from llava_ds.quickstart.concepts import load_concepts
from llava_ds.quickstart.scienceqa.prepare import write_scienceqa
from llava_ds.schema import Turn
from tests.helpers.commands import invoke
from tests.helpers.tiny import write_run, write_world


def _evaluate(*options: object) -> Result:
    return invoke("evaluate", *options)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny run, problems in ScienceQA's layout, and two questions of LLaVA-Bench."""
    root = write_world(tmp_path_factory.mktemp("evaluate"))
    write_run(root)
    quickstart = root / "quickstart"
    (quickstart / "images").mkdir(parents=True)
    (quickstart / "sources.json").write_text(json.dumps({"trained": ["twemoji"], "unseen": "noto"}))
    for concept in load_concepts():
        for style in ("twemoji", "noto"):
            file = quickstart / "images" / f"{style}-{concept.code_points.lower()}.png"
            Image.new("RGB", (42, 42), "red").save(file)
    write_scienceqa(root / "scienceqa", quickstart, {"train": 7, "val": 7, "test": 14})
    lines = [
        {"question_id": 8, "image": "1.png", "text": "Where is the fox?", "category": "conv"},
        {"question_id": 2, "image": "0.png", "text": "What is this?", "category": "detail"},
    ]
    (root / "data" / "bench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_scienceqa_is_asked_written_and_scored(world, tmp_path, monkeypatch):
    files = ("--predictions", tmp_path / "p.jsonl", "--json", tmp_path / "s.json")
    options = (world / "run", "--task", "scienceqa", "--data", world / "scienceqa", "--max-new-tokens", 4, *files)
    done = _evaluate(*options, "--batch-size", 3)
    assert done.exit_code == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    pids = json.loads((world / "scienceqa" / "pid_splits.json").read_text())["test"]
    assert [record["id"] for record in records] == pids
    assert all(set(record) == {"id", "text", "prompt", "model"} for record in records)
    problems = json.loads((world / "scienceqa" / "problems.json").read_text())
    for record in records:
        assert record["prompt"].startswith("<image>\n") == (problems[record["id"]]["image"] is not None)
        assert record["prompt"].count("Options: (A) ") == 1
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["checkpoint"] == str(world / "run") and list(scores["predictions"]) == pids
    assert scores["total"] == 14 and scores["by_column"]["NAT"]["total"] == 6
    assert "correct: NAT" in done.stdout

    def build(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr("llava_ds.checkpoint.load.assemble", build)
    again = _evaluate(*options)  # all is there
    assert again.exit_code == 0 and again.stdout == done.stdout
    lost = _evaluate(*options[:-1], tmp_path / ("x" * 300))
    assert lost.exit_code == 1 and lost.stdout == done.stdout and "Error: OSError: [Errno 36]" in lost.stderr
    refused = _evaluate(*options, "--directly")
    assert refused.exit_code == 1 and "answers of other settings:\n  questions: " in refused.stderr
    assert json.loads((tmp_path / "s.json").read_text()) == scores


def test_the_letter_alone_may_be_asked_and_the_image_may_stand_last(world, tmp_path):
    options = ("--task", "scienceqa", "--data", world / "scienceqa", "--split", "minitest", "--max-new-tokens", 2)
    files = ("--predictions", tmp_path / "p.jsonl")
    done = _evaluate(world / "run", *options, *files, "--directly", "--image-last", "--precision", "bf16")
    assert done.exit_code == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert all(record["prompt"].endswith(f"\n{ANSWER_DIRECTLY}") for record in records)
    placed = [record["prompt"] for record in records if "<image>" in record["prompt"]]
    assert len(placed) == 6 and all(f"\n<image>\n{ANSWER_DIRECTLY}" in prompt for prompt in placed)


def test_llava_bench_is_answered_for_the_judge(world, tmp_path):
    out = tmp_path / "answers.jsonl"
    data = world / "data" / "bench.jsonl"
    options = ("--task", "llava_bench", "--data", data, "--predictions", out, "--max-new-tokens", 5)
    done = _evaluate(world / "run", *options)
    assert done.exit_code == 0, done.stderr
    assert f"2 answers in {out}" in done.stdout
    session = load_session(world / "run")
    expected = [
        session.answer_batch([[Turn("user", f"<image>\n{text}")]], [[world / "data" / image]], Sampling(5))[0]
        for text, image in (("Where is the fox?", "1.png"), ("What is this?", "0.png"))
    ]
    asked = [json.loads(line) for line in data.read_text().splitlines()]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record.pop("text") for record in records] == expected
    assert records == [
        {key: line[key] for key in ("question_id", "image", "category")}
        | {"prompt": line["text"], "model": str(world / "run")}
        for line in asked
    ]


REFUSED = [
    ("--task scienceqa --data {w}/scienceqa", "--task scienceqa needs --predictions FILE.jsonl"),
    ("--task llava_bench", "needs --data FILE, its questions and --predictions FILE.jsonl"),
    ("--task scienceqa --data {w}/scienceqa --split tset --predictions {w}/p.jsonl", "no split 'tset'; it holds"),
    ("--task scienceqa --data {w}/data --predictions {w}/p.jsonl", "problems.json: cannot be read"),
    ("--task scienceqa --data {w}/scienceqa --prompt-format QCM --predictions {w}/p.jsonl", "prompt format 'QCM'"),
    ("--task scienceqa --data {w}/scienceqa --image-root {w}/data --predictions {w}/p.jsonl",
     "6 of 14 problems cannot be asked", "data.image_root"),
    ("--task llava_bench --data {w}/none.jsonl --predictions {w}/p.jsonl", "{w}/none.jsonl: no such file"),
    ("--task llava_bench --data {w}/data/bench.jsonl --image-root {w} --predictions {w}/p.jsonl",
     "2 image file(s) are missing", "bench.jsonl:1: {w}/1.png", "--image-root"),
    ("--predictions {w}/none/p.jsonl", "{w}/none; create it"),
    ("--predictions {w}/p.json --json {w}/data/../p.json", "--predictions and --json are one file, {w}/data/../p.json"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_bad_input_is_refused_before_a_model_is_built(world, monkeypatch, case):
    def build(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr("llava_ds.checkpoint.load.assemble", build)
    command, *wanted = (text.format(w=world) for text in case)
    before = sorted(world.rglob("*"))
    done = _evaluate(world / "run", *command.split())
    assert isinstance(done.exception, SystemExit) and done.exit_code != 0 and done.stdout == ""
    assert [text for text in wanted if text not in done.stderr] == [], done.stderr
    assert sorted(world.rglob("*")) == before
