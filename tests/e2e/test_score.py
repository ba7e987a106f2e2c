"""tools/score as its users call it; the text-only model is a real endpoint on loopback."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.chat_server import MODEL, serve_chat
from tests.helpers.commands import invoke
from tests.helpers.fault_proxy import fault_proxy
from tests.helpers.scienceqa import PROBLEMS, write_predictions, write_scienceqa

LLAVA = {pid: f"The answer is {letter}." for pid, letter in [("1", "A"), ("2", "C"), ("3", "C"), ("6", "B")]}
LLAVA |= {"4": "no idea"}


@pytest.fixture
def score(tmp_path):
    """The command."""
    return partial(invoke, "score", "--task", "scienceqa", "--json", tmp_path / "out.json")


def _report(folder: Path) -> dict:
    return json.loads((folder / "out.json").read_text())


def test_ours_and_the_official_rule_side_by_side(tmp_path, score):
    problems = write_scienceqa(tmp_path)
    texts = {"1": "(A)", "2": "B", "3": "The answer is C.", "4": "A\n", "5": "The answer is B", "99": "A"}
    file = write_predictions(tmp_path / "LLaVA", texts, prompt="<image>\nWhich?")
    done = score("--predictions", file, *problems)
    assert done.exit_code == 0, done.output
    assert "1 predictions are left out; they are for no problem of the split, the first: 99" in done.stderr
    rows = {line[:34].strip(): line[34:].split() for line in done.stdout.splitlines()}
    assert rows["paper: LLaVA"][-1] == "90.92" and rows["paper: LLaVA + GPT-4 (judge)"][-1] == "92.53"
    assert rows["LLaVA"][-1] == "83.33"  # of the file, which does not take the paper's place
    assert "83.33" in done.stdout.splitlines()[-3] and "all 5/6" in done.stdout and "missing 1" in done.stdout
    ours = _report(tmp_path)
    assert ours["predictions"] == {"1": 0, "2": 1, "3": 2, "4": 0, "5": 1, "6": -1}
    assert (ours["rule"], ours["correct"], ours["total"], ours["failed"], ours["not_in_split"]) == ("ours", 5, 6, 1, 1)
    assert ours["accuracy"] == 100 * 5 / 6

    assert score("--predictions", file, *problems, "--official").exit_code == 0
    official = _report(tmp_path)
    assert official["predictions"] == {"1": -1, "2": 1, "3": 2, "4": -1, "5": -1, "6": -1}
    assert official["by_column"]["IMG"] == {"accuracy": 40.0, "correct": 2, "total": 5}


def test_without_problems_the_choices_are_written(tmp_path, score):
    (tmp_path / "results.json").write_text(json.dumps({"outputs": LLAVA}))
    done = score("--predictions", tmp_path / "results.json")
    assert done.exit_code == 0, done.output
    assert done.stdout == "without an answer: 1 of 5 (no letter 1)\n"
    assert _report(tmp_path)["predictions"] == {"1": 0, "2": 2, "3": 2, "6": 1, "4": -1}


def test_a_result_that_cannot_be_written_is_an_error_after_the_scores(tmp_path, score):
    done = score("--predictions", write_predictions(tmp_path / "mine.jsonl", LLAVA), "--json", tmp_path / ("x" * 300))
    assert done.exit_code == 1 and done.stdout == "without an answer: 1 of 5 (no letter 1)\n"
    assert "Error: OSError: [Errno 36]" in done.stderr


def test_bad_options_and_files_leave_nothing_behind(tmp_path, score):
    problems = write_scienceqa(tmp_path)
    file = write_predictions(tmp_path / "mine.jsonl", LLAVA)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    cases = [
        (["--predictions", tmp_path / "none"], "none: cannot be read"),
        (["--predictions", broken], "broken.jsonl:1: not valid JSON"),
        (["--predictions", file, *problems[:2]], "--problems and --splits go together"),
        (["--predictions", file, "--ensemble", "judge"], "--ensemble and --second go together\n"),
        (["--predictions", file, "--ask-second"], "--ask-second needs --second"),
        (["--predictions", file, "--shots", 0], "--shots needs --ask-second"),
        (["--predictions", file, "--dry-run"], "--dry-run needs --ask-second or --ensemble judge"),
        (["--predictions", file, *problems, "--split", "val"], "no split 'val'; it holds train, test"),
        (["--predictions", file, *problems, "--split", "train"], "none of the 5 predictions"),
        (["--predictions", file, *problems, "--second", file, "--ensemble", "judge", "--ask-second"], "exists already"),
        (["--predictions", file, *problems, "--second", file, "--ensemble", "judge"], "no model is named"),
        (["--predictions", file, "--json", tmp_path / "no" / "out.json"], "there is no folder"),
        (["--predictions", file, "--json", file], "--predictions and --json are one file"),
        (["--predictions", file, *problems, "--json", problems[1]], "--problems and --json are one file"),
        (["--predictions", file, "--second", tmp_path / "second", "--json", tmp_path / "second"],
         "--second and --json are one file"),
    ]
    for options, message in cases:
        done = score(*options)
        assert done.exit_code in (1, 2) and done.stdout == ""
        assert message in done.stderr
        assert not (tmp_path / "out.json").exists()


def _text_model(body: dict) -> str:
    """Knows 1, 3 and 5; has no answer to 4; is wrong on 2 and 6. As a judge it takes the side of the letter B."""
    system, question = body["messages"][0]["content"], body["messages"][-1]["content"]
    if "disagree" in system:
        assert question.count("[Assistant") == 2
        return "The answer is B." if "answer is B" in question else "I cannot say."
    return {"1": "The answer is A.", "2": "So, the answer is A.", "3": "(C)", "5": "B", "6": "A", "4": "unclear"}[
        re.search(r"number (\d)", question)[1]
    ]


@pytest.fixture
def asked(tmp_path):
    """Problems that tell which they are, so that an answer can be wrong on purpose; options but for --base-url."""
    options = write_scienceqa(tmp_path)
    content = json.loads((tmp_path / "problems.json").read_text())
    for pid, record in content.items():
        record["question"] += f" number {pid}"
    (tmp_path / "problems.json").write_text(json.dumps(content))
    llava = write_predictions(tmp_path / "llava.jsonl", LLAVA)
    return [*options, "--predictions", llava, "--second", tmp_path / "second.jsonl", "--model", "text",
            "--cache", tmp_path / "cache"]  # fmt: skip


def test_a_text_model_is_asked_once_and_complements_then_judges(tmp_path, score, asked):
    with fault_proxy(_text_model, fault_frac=0.3, faults=["http_500", "bad_json"], max_faults=2) as proxy:
        asked += ["--base-url", proxy.base_url]
        dry = score(*asked, "--ensemble", "complement", "--ask-second", "--dry-run")
        assert dry.exit_code == 0 and "6 calls, 0 of them in the cache" in dry.stdout
        assert not proxy.answered and not (tmp_path / "out.json").exists() and not (tmp_path / "second.jsonl").exists()

        done = score(*asked, "--ensemble", "complement", "--ask-second")
        assert done.exit_code == 0, done.output
        assert len(proxy.answered) == 6
        second = [json.loads(line) for line in (tmp_path / "second.jsonl").read_text().splitlines()]
        assert [record["id"] for record in second] == [*PROBLEMS]
        assert {record["model"] for record in second} == {"text"}
        report = _report(tmp_path)
        # second, 4 has no answer by either; 1 A, 2 A (wrong), 3 C, 5 B, 6 A (wrong)
        assert report["predictions"] == {"1": 0, "2": 0, "3": 2, "4": -1, "5": 1, "6": 0}
        assert report["ensemble"]["cases"] == {"agree": 2, "differ": 2, "only_first": 0, "only_second": 1, "none": 1}
        parts = report["ensemble"]["first"], report["ensemble"]["second"], report
        assert [part["correct"] for part in parts] == [2, 3, 3]
        asked_of = report["ensemble"]["asked"]
        assert (asked_of["model"], asked_of["num_shots"], asked_of["api"]["accepted"]) == ("text", 2, 6)
        assert done.stdout.splitlines()[-1].startswith("6 of 6 requests answered: ")

        dry = score(*asked, "--ensemble", "judge", "--dry-run")
        assert "2 calls, 0 of them in the cache" in dry.stdout
        done = score(*asked, "--ensemble", "judge")
        assert done.exit_code == 0, done.output
        assert len(proxy.answered) == 8
        report = _report(tmp_path)
        # 2: C against A, no verdict, so LLaVA's C; 6: B against A, the verdict is B
        assert report["predictions"] == {"1": 0, "2": 2, "3": 2, "4": -1, "5": 1, "6": 1}
        judge = report["ensemble"]["judge"]
        assert {pid: reply["text"] for pid, reply in judge["replies"].items()} == {
            "2": "I cannot say.", "6": "The answer is B.",
        }  # fmt: skip
        assert judge["failed_by_reason"]["no letter"] == 1
        asked_of = report["ensemble"]["asked"]
        assert (asked_of["model"], asked_of["api"]["accepted"]) == ("text", 2) and "num_shots" not in asked_of
        assert score(*asked, "--ensemble", "judge").exit_code == 0
        assert len(proxy.answered) == 8 and not proxy.paid_twice()
    assert _report(tmp_path)["ensemble"]["judge"]["replies"] == judge["replies"]


def test_solved_problems_come_first_and_are_none_of_the_split(tmp_path, score, asked):
    seen = []

    def answer(body: dict) -> str:
        seen.append(body["messages"])
        return "A"

    with fault_proxy(answer) as proxy:
        options = [*asked, "--base-url", proxy.base_url, "--ensemble", "complement", "--ask-second"]
        too_many = score(*options, "--shots", 3)
        assert "--shots 3: split 'train' has 2 problems with an explanation" in too_many.stderr
        assert score(*options).exit_code == 0
    assert len(seen) == 6
    for messages in seen:
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert ["number 92" in messages[1]["content"], "number 93" in messages[3]["content"]] == [True, True]
        assert messages[2]["content"] == "Mass is matter. Stones are dense. The answer is C."
        assert "Options: (A) a feather (B) a stone (C) water" in messages[5]["content"]


def test_replies_that_do_not_come_are_counted_and_nothing_is_written(tmp_path, score, asked):
    with fault_proxy(_text_model) as proxy:
        options = [*asked, "--base-url", proxy.base_url, "--ensemble", "complement", "--ask-second"]
        done = score(*options, "--max-total-tokens", 0)
        assert done.exit_code == 1
        assert "6 of 6 requests have no reply:\n  budget (6, the first: 1, 2, 3)\n" in done.stderr
        assert "Run the same command again" in done.stderr and "refused" not in done.stderr
        assert not (tmp_path / "out.json").exists() and not (tmp_path / "second.jsonl").exists()
        assert score(*options).exit_code == 0


def test_a_judge_that_fails_does_not_stand_in_the_way_of_the_same_command(tmp_path, score, asked):
    with fault_proxy(_text_model) as proxy:
        options = [*asked, "--base-url", proxy.base_url, "--ensemble"]
        assert score(*options, "complement", "--ask-second").exit_code == 0
        (tmp_path / "second.jsonl").unlink()
        options += ["judge", "--ask-second"]
        assert "2 of 2 requests have no reply" in score(*options, "--max-total-tokens", 0).stderr
        done = score(*options)
        assert done.exit_code == 0, done.output
        assert len(proxy.answered) == 8 and not proxy.paid_twice()
    assert len((tmp_path / "second.jsonl").read_text().splitlines()) == 6


def test_half_a_character_is_named_before_the_judge_is_asked(tmp_path, score, asked):
    write_predictions(tmp_path / "second.jsonl", {"1": "A", "2": "The answer is A. \ud83d"})
    with fault_proxy(_text_model) as proxy:
        done = score(*asked, "--base-url", proxy.base_url, "--ensemble", "judge")
        assert done.exit_code == 1 and f"{tmp_path / 'second.jsonl'}:2: not Unicode text: " in done.stderr
        assert not proxy.answered


def test_half_a_character_of_a_reply_does_not_stop_the_judge(tmp_path, score, asked):
    with fault_proxy(lambda body: _text_model(body) + " \ud83d") as proxy:
        done = score(*asked, "--base-url", proxy.base_url, "--ensemble", "judge", "--ask-second")
        assert done.exit_code == 0, done.output
    assert '\\ufffd' in (tmp_path / "second.jsonl").read_text()


def test_a_split_without_training_problems_says_what_to_do(tmp_path, score, asked):
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": [*PROBLEMS]}))
    with fault_proxy(_text_model) as proxy:
        options = [*asked, "--base-url", proxy.base_url, "--ensemble", "complement", "--ask-second"]
        done = score(*options)
        assert done.exit_code == 1 and "no split 'train'" in done.stderr and "; --shots 0 asks without" in done.stderr
        assert score(*options, "--shots", 0).exit_code == 0


@pytest.mark.slow
def test_a_live_model_answers_and_judges(tmp_path, score, asked):
    grammar = json.dumps({"grammar": 'root ::= "The answer is " [A-C] "."', "max_tokens": 16})
    with serve_chat() as base_url:
        asked[asked.index("text")] = MODEL
        options = [*asked, "--base-url", base_url, "--extra-body", grammar, "--ensemble", "judge"]
        done = score(*options, "--ask-second")
        assert done.exit_code == 0, done.output
    report = _report(tmp_path)
    cases = report["ensemble"]["cases"]
    assert cases["agree"] + cases["differ"] == 4 and cases["only_second"] == 2  # LLaVA has none for 4 and 5
    assert len(report["ensemble"]["judge"]["replies"]) == cases["differ"] > 0
    assert report["failed"] == 0 and report["total"] == 6
