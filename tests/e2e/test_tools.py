"""The commands over a run: right input gives an answer; bad input a reason on stderr, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ds.checkpoint.fragments import shard_names
from llava_ds.inference.session import Sampling, Session, load_session
from llava_ds.schema import Turn
from tests.helpers.commands import invoke
from tests.helpers.fork_server import Script, run_scripts
from tests.helpers.launch import clean_environ
from tests.helpers.tiny import write_run, write_world

TOOLS = Path(__file__).parents[2] / "tools"
WHAT, WHERE = "What is this?", "Where is the fox?"
STEP = "checkpoints/step-00000004"
SHARD = shard_names(1, 3)[0]


def _start(tool: str, *options: object) -> subprocess.Popen:
    """The command as a user starts it."""
    command = [sys.executable, str(TOOLS / tool), *map(str, options)]
    pipe = subprocess.PIPE
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environ)


def _script(tool: str, *options: object, stdin: str = "") -> Script:
    """The command as a process of its own."""
    return Script([str(TOOLS / tool), *map(str, options)], clean_environ(), stdin)


def _printed(*scripts: Script) -> list[str]:
    """What commands printed that went well."""
    done = run_scripts(scripts)
    assert [one.returncode for one in done] == [0] * len(scripts), "\n".join(one.stderr for one in done)
    return [one.stdout for one in done]


def _answer(session: Session, turns: list[Turn], images: list[Path]) -> str:
    return "".join(session.stream(turns, images, Sampling(max_new_tokens=5))).strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The tiny world with a whole run, runs that are not, and question files that are not."""
    root = write_world(tmp_path_factory.mktemp("tools"))
    write_run(root)
    write_run(root, "stage1", data__template="plain")
    shutil.copytree(root / "run", root / "unfinished")
    (root / "unfinished" / STEP / "COMPLETE").unlink()
    shutil.copytree(root / "run", root / "damaged")
    (root / "damaged" / STEP / SHARD).write_bytes(b"no weights")
    (root / "half_merged").mkdir()
    (root / "half_merged" / "llava_ds.json").write_text("{}")

    data = root / "data"
    (data / "broken.png").write_bytes(b"no picture")
    (data / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\5IHDR\0\0\0\1\0\0\0\0\0")  # PIL raises ValueError
    good = {"id": "q", "image": "0.png", "kind": "name", "question": WHAT, "answer": "a red fox"}
    files = {
        "broken": "[{",
        "empty": "[]",
        "number": "7",
        "without_answer": json.dumps([good, {key: good[key] for key in good if key != "answer"}]),
        "answer_is_2": json.dumps([good | {"answer": 2}]),
        "image_is_missing": json.dumps([good, good | {"id": "r", "image": "none.png"}]),
        "image_is_broken": json.dumps([good, good | {"id": "r", "image": "broken.png"}]),
        "two_images": json.dumps([good | {"question": "<image><image>"}]),
    }
    for name, text in files.items():
        (data / f"{name}.json").write_text(text)
    (data / "latin1.json").write_bytes(b'["\xe9"]')
    return root


@pytest.fixture(scope="module")
def session(world) -> Session:
    return load_session(world / "run")


@pytest.fixture(scope="module")
def merged(world) -> Path:
    """The run, merged by the command."""
    out = world / "merged"
    (stdout,) = _printed(_script("merge_ckpt", world / "run", out))
    assert f"Try: tools/chat {out} --image FILE" in stdout
    assert (out / "COMPLETE").is_file()
    assert not list(world.glob(".*"))
    return out


def test_chat_answers_one_question_or_a_conversation(world, session, merged):
    image = world / "data" / "0.png"
    options = (merged, "--image", image, "--max-new-tokens", 5)
    once, several = _printed(
        _script("chat", *options, "--prompt", WHAT), _script("chat", *options, stdin=f"{WHAT}\n{WHERE}\n\n")
    )
    turns = [Turn("user", f"<image>\n{WHAT}")]
    first = _answer(session, turns, [image])
    assert first
    assert once.strip() == first
    turns += [Turn("assistant", first), Turn("user", WHERE)]
    second = _answer(session, turns, [image])
    assert [line.strip() for line in several.split("you: ")] == ["", first, second, ""]


def test_evaluate_prints_and_writes_the_same_scores(world, session, merged):
    image = world / "data" / "0.png"
    right = session.answer_batch([[Turn("user", f"<image>\n{WHAT}")]], [[image]], Sampling(max_new_tokens=32))[0]
    asked = {"image": "0.png", "question": WHAT}
    questions = [
        asked | {"id": "a", "kind": "name", "answer": right.upper()},
        asked | {"id": "b", "kind": "name", "answer": "not this"},
        asked | {"id": "c", "kind": "place", "answer": "nor this", "image": "1.png", "question": WHERE},
    ]
    (world / "questions.json").write_text(json.dumps(questions))
    options = ("--questions", world / "questions.json", "--image-root", world / "data", "--json", world / "scores.json")
    printed = json.loads(_printed(_script("evaluate", merged, *options))[0])
    assert printed == {"accuracy": {"name": 0.5, "place": 0.0}, "num_questions": {"name": 2, "place": 1}}
    written = json.loads((world / "scores.json").read_text())
    records = written.pop("records")
    assert written == {"checkpoint": str(merged), **printed}
    assert [{key: record[key] for key in questions[0]} for record in records] == questions
    assert [set(record) - set(questions[0]) for record in records] == [{"prediction", "correct"}] * 3
    assert [record["correct"] for record in records] == [True, False, False]
    assert records[0]["prediction"] == right


def test_where_the_image_stands_may_be_typed_and_no_image_is_needed(world, session):
    image = world / "data" / "0.png"
    for images, typed, text in [([image], f"{WHAT}\n<image>", f"{WHAT}\n<image>"), ([], WHAT, WHAT)]:
        options = [option for file in images for option in ("--image", file)]
        done = invoke("chat", world / "run", *options, "--prompt", typed, "--max-new-tokens", 5)
        assert done.exit_code == 0, done.stderr
        assert done.stdout.strip() == _answer(session, [Turn("user", text)], images)


def test_a_slip_does_not_end_a_conversation(world, session):
    image = world / "data" / "0.png"
    options = (world / "run", "--image", image, "--max-new-tokens", 5)
    done = invoke("chat", *options, stdin=f"<image> or <image>?\n{WHAT}\n")  # ends with Ctrl-D
    assert done.exit_code == 0
    assert "Error: 2 '<image>' in the questions but 1 image(s) given" in done.stderr
    assert _answer(session, [Turn("user", f"<image>\n{WHAT}")], [image]) in done.stdout


# Commands, and what their errors name and advise. Nothing of the model is built before these are reported.
EARLY = [
    ("merge_ckpt {w}/nowhere {w}/out", "{w}/nowhere: no such folder; give a run folder"),
    ("merge_ckpt {w}/unfinished {w}/out", "{w}/unfinished holds no complete checkpoint", "another run"),
    ("merge_ckpt {w}/unfinished/{step} {w}/out", "{w}/unfinished/{step} is not complete", "use an earlier step"),
    ("merge_ckpt {w}/run {w}/data", "{w}/data exists already; give another folder"),
    ("chat {w}/nowhere --prompt Hi", "{w}/nowhere: no such folder; give a run folder"),
    ("chat {w}/unfinished --prompt Hi", "{w}/unfinished holds no complete checkpoint", "another run"),
    ("chat {w}/half_merged --prompt Hi", "{w}/half_merged is not complete", "merge again"),
    ("chat {w}/run --prompt Hi --image {w}/none.png", "{w}/none.png: no such file; fix the path"),
    ("chat {w}/run --prompt Hi --image {w}/data", "{w}/data cannot be read", "see that the file can be opened"),
    ("chat {w}/run --prompt Hi --image {w}/data/broken.png", "{w}/data/broken.png does not decode", "replace the file"),
    ("chat {w}/run --prompt Hi --image {w}/data/cut.png", "{w}/data/cut.png does not decode", "replace the file"),
    ("chat {w}/run --prompt=", "--prompt is empty; give a question"),
    ("evaluate {w}/nowhere", "{w}/nowhere: no such folder; give a run folder"),
    ("evaluate {w}/unfinished", "{w}/unfinished holds no complete checkpoint", "another run"),
    ("evaluate {w}/run --questions {d}/none.json", "{d}/none.json: no such file; give a JSON list of questions"),
    ("evaluate {w}/run --questions {d}/broken.json", "{d}/broken.json:1:3: not valid JSON", "give a JSON list"),
    ("evaluate {w}/run --questions {d}/latin1.json", "{d}/latin1.json: not UTF-8", "give a JSON list"),
    ("evaluate {w}/run --questions {d}/empty.json", "{d}/empty.json: expected a list", "give a JSON list"),
    ("evaluate {w}/run --questions {d}/number.json", "{d}/number.json: expected a list", "give a JSON list"),
    ("evaluate {w}/run --questions {d}/train.json", "{d}/train.json[0]: lacks kind, question, answer; every"),
    ("evaluate {w}/run --questions {d}/without_answer.json", "{d}/without_answer.json[1]: lacks answer; every"),
    ("evaluate {w}/run --questions {d}/answer_is_2.json", "{d}/answer_is_2.json[0]", "answer must be text"),
    ("evaluate {w}/run --questions {d}/image_is_missing.json", "[1]: {d}/none.png", "Fix the paths"),
    ("evaluate {w}/run --questions {d}/two_images.json", "{d}/two_images.json[0]", "a question has one image"),
    ("evaluate {w}/run --questions {d}/image_is_broken.json --json {w}/none/s.json", "{w}/none; create it"),
    ("evaluate {w}/run --questions {d}/image_is_broken.json --json {d}", "'{d}' is a directory"),
]
# These need the model, or the folder that it is loaded from.
LATE = [
    ("merge_ckpt {w}/damaged {w}/out", "{w}/damaged/{step}/{shard}: bytes", "expected, 10 found", "an earlier step"),
    ("merge_ckpt {w}/run {w}/out --max-shard-size 5", "'5' is not a size; write it as 5GB"),
    ("chat {w}/damaged --prompt Hi", "{w}/damaged/{step}/{shard}: bytes", "expected, 10 found", "an earlier step"),
    ("merge_ckpt {w}/run {d}/0.png/out", "{d}/0.png/out cannot be made", "give another folder"),
    ("chat {w}/run --prompt <image>", "1 '<image>' in the questions but 0 image(s) given", "take it out"),
    ("chat {w}/run --prompt <image><image> --image {d}/0.png", "2 '<image>' in the questions but 1", "as many"),
    ("chat {w}/stage1 --prompt Hi", "template 'plain' (stage 1) keeps only the images", "give an image"),
    ("evaluate {w}/run --questions {d}/image_is_broken.json --json {w}/s.json", "broken.png does not decode", "drop"),
]


def _check_refused(world: Path, case: tuple[str, ...]) -> None:
    command, *wanted = (text.format(w=world, d=world / "data", step=STEP, shard=SHARD) for text in case)
    before = sorted(world.rglob("*"))
    done = invoke(*command.split())
    assert isinstance(done.exception, SystemExit), done.exception  # not the exception of a traceback
    assert done.exit_code != 0
    assert done.stdout == ""
    assert [text for text in wanted if text not in done.stderr] == [], done.stderr
    assert sorted(world.rglob("*")) == before


@pytest.mark.parametrize("case", EARLY, ids=lambda case: case[0])
def test_bad_input_is_refused_before_a_model_is_built(world, monkeypatch, case):
    def build(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr("llava_ds.checkpoint.load.assemble", build)
    _check_refused(world, case)


@pytest.mark.parametrize("case", LATE, ids=lambda case: case[0])
def test_bad_input_is_refused(world, case):
    _check_refused(world, case)


def test_a_real_process_fails_with_the_reason_on_stderr_and_no_traceback(world):
    before = sorted(world.rglob("*"))
    started = [
        _start("merge_ckpt", world / "unfinished", world / "out"),
        _start("chat", world / "run", "--image", world / "data" / "broken.png", "--prompt", "Hi"),
        _start("evaluate", world / "run", "--questions", world / "data" / "image_is_missing.json"),
    ]
    for process, named in zip(started, ("unfinished", "broken.png", "none.png"), strict=True):
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        assert stdout == ""
        assert "Error: " in stderr
        assert named in stderr
        assert "Traceback" not in stderr
    assert sorted(world.rglob("*")) == before
