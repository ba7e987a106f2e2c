"""tools/evaluate under launchers: ranks share the questions, and what a kill leaves is not asked again."""

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from llava_ds.distributed import free_port
from tests.helpers.launch import ROOT, clean_environ, deepspeed_command
from tests.helpers.tiny import write_run, write_world

pytestmark = pytest.mark.slow
TOOL = ROOT / "tools" / "evaluate"
NUM_QUESTIONS = 150


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny run, and questions of different lengths about its pictures."""
    root = write_world(tmp_path_factory.mktemp("evaluate"))
    write_run(root)
    pictures = sorted(path.name for path in (root / "data").glob("*.png"))
    assert len(pictures) == 9
    lines = [
        {"question_id": number, "image": pictures[number % 9], "text": "Where is the fox? " * (1 + number * 7 % 5),
         "category": "conv"}
        for number in range(NUM_QUESTIONS)
    ]
    (root / "data" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def _options(world: Path, name: str) -> list[str]:
    questions = world / "data" / "questions.jsonl"
    return [
        str(world / "run"), "--task", "llava_bench", "--data", str(questions), "--predictions", f"{world / name}.jsonl",
        "--json", f"{world / name}.json", "--max-new-tokens", "16", "--batch-size", "4",
    ]


def _torchrun(num_ranks: int) -> list[str]:
    return ["torchrun", "--nproc_per_node", str(num_ranks), "--master_port", str(free_port()), str(TOOL)]


def _start(command: list[str], log: Path) -> psutil.Popen:
    with log.open("w") as handle:
        return psutil.Popen(command, env=clean_environ(), stdout=handle, stderr=handle)


def _finish(command: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def alone(world) -> str:
    """What one process writes."""
    done = _finish(["python", str(TOOL), *_options(world, "alone")])
    assert f"{NUM_QUESTIONS} answers in" in done.stdout
    return (world / "alone.jsonl").read_text()


def test_one_process_answers_all_in_order(alone):
    records = [json.loads(line) for line in alone.splitlines()]
    assert [record["question_id"] for record in records] == list(range(NUM_QUESTIONS))
    assert len({record["text"] for record in records}) > 5
    assert set(records[0]) == {"question_id", "image", "category", "prompt", "text", "model"}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_write_what_one_writes(world, alone, launcher):
    command = _torchrun(2) if launcher == "torchrun" else deepspeed_command(2, TOOL)
    done = _finish([*command, *_options(world, launcher)])
    assert (world / f"{launcher}.jsonl").read_text() == alone
    assert (done.stdout + done.stderr).count("75 of them on each of 2 rank(s)") == 1  # rank 0 alone speaks
    assert json.loads((world / f"{launcher}.json").read_text())["num_questions"] == NUM_QUESTIONS


def _kill_when_half_done(command: list[str], parts: Path, log: Path) -> int:
    """Kills all processes of a launch; returns how many answers are kept."""
    launcher = _start(command, log)

    def count() -> list[int]:
        return [len(part.read_text().splitlines()) for part in parts.glob("*.jsonl")]

    while len(count()) < 2 or min(count()) < 8:
        assert launcher.poll() is None, log.read_text()
        time.sleep(0.02)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=60)
    return sum(count())


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_killed_evaluation_goes_on_with_any_number_of_ranks(world, alone, num_ranks):
    name = f"killed-{num_ranks}"
    parts = world / f"{name}.jsonl.parts"
    num_kept = _kill_when_half_done([*_torchrun(2), *_options(world, name)], parts, world / f"{name}.log")
    assert 16 <= num_kept < NUM_QUESTIONS
    assert not (world / f"{name}.jsonl").exists() and not (world / f"{name}.json").exists()
    (next(parts.glob("*.jsonl"))).open("a").write('{"id": "7", "te')  # cut off

    other = subprocess.run(
        ["python", str(TOOL), *_options(world, name), "--temperature", "0.2"],
        env=clean_environ(), capture_output=True, text=True, timeout=200,
    )
    assert other.returncode == 1 and "temperature: 0.0 there, 0.2 now" in other.stderr

    command = _torchrun(num_ranks) if num_ranks > 1 else ["python", str(TOOL)]
    done = _finish([*command, *_options(world, name)])
    assert f"{num_kept} of {NUM_QUESTIONS} questions have an answer already" in done.stderr
    assert f"asking {NUM_QUESTIONS - num_kept} questions" in done.stderr
    assert (world / f"{name}.jsonl").read_text() == alone
    assert not parts.exists()


def test_an_error_on_one_rank_ends_all_after_they_have_answered(world, alone):
    """A picture that does not decode lies in one rank's share."""
    (world / "broken").mkdir()
    for file in (world / "data").glob("*.png"):
        (world / "broken" / file.name).write_bytes(b"no picture" if file.name == "0.png" else file.read_bytes())
    options = [*_options(world, "broken"), "--image-root", str(world / "broken"), "--batch-size", "1"]
    done = subprocess.run(
        [*_torchrun(2), *options], env=clean_environ(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode != 0 and "0.png does not decode" in done.stderr and "Traceback (most" not in done.stdout
    num_kept = sum(len(part.read_text().splitlines()) for part in (world / "broken.jsonl.parts").glob("*.jsonl"))
    with_it = sum(json.loads(line)["image"] == "0.png" for line in alone.splitlines())
    assert with_it > 10 and num_kept == NUM_QUESTIONS - with_it
