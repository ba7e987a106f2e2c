"""tools/inspect_data as its users call it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

from tests.helpers.commands import invoke
from tests.unit.test_encode_golden import HANDLED, REFUSED, TYPED_SPECIALS, _cases, _write_vicuna

TOOL = Path(__file__).parents[2] / "tools" / "inspect_data"
CONVERSATIONS = Path(__file__).parents[1] / "golden" / "conversations.json"


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory) -> str:
    return str(_write_vicuna(tmp_path_factory.mktemp("inspect") / "vicuna"))


def _run(*arguments: str) -> Result:
    return invoke("inspect_data", *arguments)


@pytest.mark.parametrize(("template", "limit", "num_exact"), [("v1", 96, 23), ("v0", 2048, 31), ("plain", 96, 9)])
def test_jsonl_gives_the_official_ids_and_labels(vicuna, template, limit, num_exact):
    options = ["--jsonl", str(CONVERSATIONS), "--tokenizer", vicuna, "--template", template, "--placement", "front",
               "--max-length", str(limit), "--truncation", "official"]
    done = _run(*options)
    assert done.exit_code == 0, done.stderr
    if template == "v1":
        alone = subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, timeout=120)
        assert (alone.returncode, alone.stdout) == (0, done.stdout), alone.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(line) for line in lines] == [["id", "input_ids", "labels", "error"]] * 36
    cases = {case["id"]: case for case in _cases(template) if case["limit"] == limit}
    assert [line["id"] for line in lines] == list(cases)
    compared = 0
    for line in lines:
        case = cases[line["id"]]
        if line["error"] is not None:
            assert line["input_ids"] is None and line["labels"] is None
            assert line["id"] in line["error"]
            assert line["id"] in REFUSED | HANDLED.keys() or template == "plain"
        elif "failed" not in case and line["id"] not in TYPED_SPECIALS:
            assert (line["input_ids"], line["labels"]) == (case["input_ids"], case["labels"]), line["id"]
            compared += 1
    assert compared == num_exact


def test_the_view_sets_off_what_is_supervised_and_says_what_was_cut(vicuna, tmp_path):
    turns = [{"from": "human", "value": "What?\x1b[31m\n<image>"}, {"from": "gpt", "value": "A fox."}]
    record = {"id": "a", "image": "x.png", "conversations": turns
              + [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + '\n{"id": 7\n')
    done = _run(str(tmp_path / "train.jsonl"), "--tokenizer", vicuna, "--template", "mistral", "--placement", "as_data",
                "--num-patches", "3", "--max-length", "26")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (
        "train.jsonl:1 id='a': 26 tokens, 6 supervised, 1 image(s), placement as_data: image last, 2 turns (13 tokens) "
        "cut\n<s> [INST] What?\\x1b[31m\n[image: 3 slots] [/INST][[ A fox. </s>]]\n\n"
        "train.jsonl:2:9: not valid JSON: Expecting ',' delimiter, near '{\"id\": 7'; every line must be one JSON "
        "value\n\n"
    )
    coloured = _run(str(tmp_path / "train.jsonl"), "--tokenizer", vicuna, "--template", "mistral", "--color")
    assert "\x1b[32;1m A fox. </s>\x1b[0m" in coloured.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--jsonl", "none.json"], 1, "no such file or folder"),
        (["none.json", "--jsonl", "--template", "v9"], 1, "no such file or folder"),
        ([str(CONVERSATIONS), "--template", "v9"], 1, "unknown template 'v9'"),
        ([str(CONVERSATIONS), "--template", "chat_template"], 1, "has none; name one of llava_ds"),
        ([str(CONVERSATIONS), "--tokenizer", "nowhere"], 1, "no tokenizer can be loaded"),
        ([str(CONVERSATIONS), "--tokenizer", str(CONVERSATIONS)], 1, "no tokenizer can be loaded"),
        ([str(CONVERSATIONS), "--epoch", "-1"], 2, "-1 is not in the range"),
        ([], 2, "Missing argument 'FILE'"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(vicuna, arguments, code, message):
    given = [] if "--tokenizer" in arguments else ["--tokenizer", vicuna]
    done = _run(*arguments, *given)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
