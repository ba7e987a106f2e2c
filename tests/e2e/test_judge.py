"""tools/judge as its users call it, against a judge on loopback whose every score is known."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from llava_ds.errors import DataError
from llava_ds.evaluation.judge_parsing import parse_scores
from llava_ds.evaluation.official_review import official_scores, official_summary
from tests.helpers.bench import (
    CATEGORIES,
    Files,
    read_rows,
    shared_coco,
    shuffle,
    write_answers,
    write_bench,
    write_rows,
)
from tests.helpers.chat_server import MODEL, serve_chat
from tests.helpers.commands import invoke
from tests.helpers.fault_proxy import FAULTS, PROMPT_TOKENS, FaultProxy, chat_reply, fault_proxy
from tests.helpers.scripted_judge import ScriptedJudge, verdict

GRAMMAR = r"""root ::= score " " score "\n" [A-Za-z ,.]+
score ::= "10" | [1-9]"""


def _run(files: Files, judge: FaultProxy | None, folder: Path, *options: object) -> Result:
    """In this process: a new one takes seconds of imports."""
    arguments = []
    for name, path in files.items():
        arguments += [f"--{name}" if name in ("questions", "references", "context") else "--answers", str(path)]
    if judge is not None:
        arguments += ["--base-url", judge.base_url, "--model", "judge", "--cache", str(folder / "cache")]
    return invoke("judge", *arguments, "--num-resamples", "200", "--json", folder / "out.json", *options)


def _report(folder: Path) -> dict:
    return json.loads((folder / "out.json").read_text())


def _numbers(report: dict) -> dict:
    """What must not depend on the order of files, nor on which run paid."""
    judgements = {
        name: [{key: value for key, value in one.items() if key != "cached"} for one in group]
        for name, group in report["judgements"].items()
    }
    return {"models": report["models"], "comparison": report.get("comparison"), "judgements": judgements}


def test_every_number_follows_from_the_judges_words(tmp_path):
    files = write_bench(tmp_path, 12, models=("ours", "theirs"))
    judge = ScriptedJudge()
    with fault_proxy(judge) as proxy:
        done = _run(files, proxy, tmp_path, "--repeats", "3", "--max-attempts", "2",
                    "--markdown", str(tmp_path / "table.md"), "--price-in", "1", "--price-out", "10")
    assert done.exit_code == 0, done.output
    report = _report(tmp_path)
    bodies, num_again = judge.asked, 0
    assert len(proxy.answered) == len(bodies)  # none was asked twice
    for name, judgements in report["judgements"].items():
        slots = [(one["question_id"], one["order"], one["repeat"]) for one in judgements]
        assert len(slots) == len(set(slots)) == 12 * 2 * 3
        scores, unreadable = {}, 0
        for one in judgements:
            first, second = "A dog, number {}.", f"{name} says {{}}"
            if one["order"] == "candidate_first":
                first, second = second, first
            wanted = [f"[Assistant {place}]\n{text.format(one['question_id'])}\n\n[End"
                      for place, text in ((1, first), (2, second))]
            mine = [body for body in bodies if all(part in body["messages"][1]["content"] for part in wanted)]
            base = min(body["seed"] for body in mine)
            tries = sorted(body["seed"] - base - 1000 * one["repeat"] for body in mine
                           if 0 <= body["seed"] - base - 1000 * one["repeat"] < 1000)
            replies = [verdict(mine[0]["messages"][1]["content"], base + 1000 * one["repeat"] + offset)
                       for offset in tries]
            assert tries == list(range(one["attempts"])) and one["text"] == replies[-1]
            num_again += len(tries) > 1
            try:
                pair = parse_scores(replies[-1])
            except DataError as error:
                assert one["scores"] is None and one["problem"] == error.reason == "no number" and len(tries) == 2
                unreadable += 1
                continue
            pair = pair if one["order"] == "reference_first" else pair[::-1]
            assert one["scores"] == list(pair) and one["problem"] is None
            scores.setdefault(one["question_id"], {}).setdefault(one["order"], []).append(pair)
        found = report["models"][name]
        assert found["unparsable"] == ({"no number": unreadable} if unreadable else {}) and not found["not_judged"]
        assert found["num_scored"] == 72 - unreadable
        means = {int(id): np.mean([np.mean(pairs, axis=0) for pairs in orders.values()], axis=0)
                 for id, orders in scores.items()}
        for number, category in enumerate(CATEGORIES):
            rows = np.array([means[id] for id in range(number, 12, 3)])
            assert found["scores"][category]["relative"] == pytest.approx(100 * rows[:, 1].sum() / rows[:, 0].sum())
        first_only = [one for one in judgements if one["order"] == "reference_first"]
        official = official_summary([(one["category"], official_scores(one["text"])) for one in first_only])
        assert found["official_rule"] == official and official["all"]["num_failed"] > 0
        assert official["all"]["num_failed"] > sum(one["scores"] is None for one in first_only)  # "8, 9"
    assert num_again > 5 and sum(one["num_scored"] < 72 for one in report["models"].values()) > 0
    assert len(bodies) == report["api"]["paid_calls"] == 144 + num_again
    num_words = sum(len(verdict(body["messages"][1]["content"], body["seed"]).split()) for body in bodies)
    assert report["api"]["cost_usd"] == pytest.approx((len(bodies) * PROMPT_TOKENS * 1 + num_words * 10) / 1e6)
    assert report["comparison"]["first"] == "ours" and "theirs - ours" in done.output
    settings = report["judge"]
    assert settings["model"] == "judge" and settings["served_as"] == {"judge": len(bodies)}
    assert settings["rule"]["own"] and len(settings["rule"]["sha256"]) == 64 and settings["repeats"] == 3
    assert (settings["temperature"], settings["max_tokens"], settings["seed"]) == (0.2, 1024, 0)
    assert {"python", "openai", "llava_ds"} <= set(report["versions"]) and len(report["files"]) == 5
    assert "| paper: LLaVA, full data | 83.1 |" in (tmp_path / "table.md").read_text()


def test_a_second_run_pays_nothing_and_file_order_means_nothing(tmp_path):
    files = write_bench(tmp_path, 9)
    with fault_proxy(ScriptedJudge()) as judge:
        assert _run(files, judge, tmp_path).exit_code == 0
        first, num_calls = _report(tmp_path), judge.totals()["good"]
        for number, path in enumerate(files.values()):
            shuffle(path, number)
        assert _run(files, judge, tmp_path).exit_code == 0
        assert judge.totals() == {"good": num_calls} and num_calls > 17
        assert _numbers(_report(tmp_path)) == _numbers(first)
        again = _run(files, judge, tmp_path, "--cache", str(tmp_path / "other"))
        assert again.exit_code == 0 and judge.totals() == {"good": 2 * num_calls}
        assert _numbers(_report(tmp_path)) == _numbers(first) and _report(tmp_path)["warnings"] == first["warnings"]
    with fault_proxy(ScriptedJudge()) as another:
        done = _run(files, another, tmp_path)
    assert not another.answered and _numbers(_report(tmp_path)) == _numbers(first)
    assert f"WARNING: {num_calls} replies out of the cache came from another endpoint" in done.output


def test_a_spent_budget_is_incomplete_and_the_next_run_pays_the_rest_only(tmp_path):
    files = write_bench(tmp_path, 9)
    with fault_proxy(ScriptedJudge()) as judge:
        done = _run(files, judge, tmp_path, "--max-total-tokens", "2400", "--concurrency", "1")
        report = _report(tmp_path)
        model = report["models"]["ours"]
        assert done.exit_code == 1 and "INCOMPLETE" in done.output and set(model["not_judged"]) == {"budget"}
        assert 0 < judge.totals()["good"] < 18 and model["num_scored"] > 0
        assert _run(files, judge, tmp_path).exit_code == 0
        assert not judge.paid_twice() and _report(tmp_path)["models"]["ours"]["not_judged"] == {}


def _same_under_faults(files: Files, folder: Path, smooth: dict, faults: Sequence[str], *options: str) -> Counter:
    """Asks again while a fifth of the calls fails: the numbers are the same, no reply is paid twice. The faults."""
    with fault_proxy(ScriptedJudge(), fault_frac=0.2, faults=faults, hang_s=6.0) as judge:
        done = _run(files, judge, folder, "--cache", str(folder / "other"), "--max-tries", "10", *options)
    assert done.exit_code == 0, done.output
    report, totals = _report(folder), judge.totals()
    assert _numbers(report) == _numbers(smooth)
    assert totals.pop("good") == smooth["api"]["paid_calls"] and not judge.paid_twice()
    assert report["api"]["faults"] == totals and set(totals) == set(faults)
    return totals


def test_faults_change_nothing(tmp_path):
    files = write_bench(tmp_path, 30)
    with fault_proxy(ScriptedJudge()) as judge:
        assert _run(files, judge, tmp_path).exit_code == 0
    quick = [fault for fault in FAULTS if fault != "timeout"]
    assert _same_under_faults(files, tmp_path, _report(tmp_path), quick, "--concurrency", "16").total() > 5


def test_several_judges_in_one_result_are_a_warning(tmp_path):
    files = write_bench(tmp_path, 6)
    with fault_proxy(ScriptedJudge("judge-0314", "judge-0613")) as judge:
        done = _run(files, judge, tmp_path, "--concurrency", "1")
    assert done.exit_code == 0
    assert "WARNING: the server answered under 2 names: judge-0314" in done.output
    assert set(_report(tmp_path)["judge"]["served_as"]) == {"judge-0314", "judge-0613"}


def test_official_rule_file_in_the_wild(tmp_path):
    files = write_bench(tmp_path, 6, kind="in_the_wild")
    rule = tmp_path / "rule.json"
    words = {"role": "Assistant", "prompt": "Rate."}
    rule.write_text(json.dumps({f"llava_bench_{name}": words for name in CATEGORIES}))
    judge = ScriptedJudge()
    with fault_proxy(judge) as proxy:
        done = _run(files, proxy, tmp_path, "--rule", str(rule), "--repeats", "2")
    assert done.exit_code == 0, done.output
    report = _report(tmp_path)
    assert report["benchmark"] == "llava_bench_in_the_wild" and "OpenFlamingo" in done.output
    assert report["judge"]["orders"] == ["reference_first"] and not report["judge"]["rule"]["own"]
    assert report["models"]["ours"]["position_bias"] is None
    assert len(report["judgements"]["ours"]) == 12 and not any("seed" in body for body in judge.asked)


def test_nothing_is_asked_when_files_do_not_fit_or_for_a_dry_run(tmp_path):
    files = write_bench(tmp_path, 9)
    with fault_proxy(ScriptedJudge()) as judge:
        done = _run(files, judge, tmp_path, "--dry-run", "--price-in", "2.5", "--price-out", "10")
        assert done.exit_code == 0 and "18 calls" in done.output and not (tmp_path / "out.json").exists()
        assert not (tmp_path / "cache").exists()
        write_rows(files["ours"], read_rows(files["ours"])[1:])
        done = _run(files, judge, tmp_path)
        assert done.exit_code == 2 and "lacks 1 of the 9 question ids" in done.output
        assert not judge.answered and not (tmp_path / "out.json").exists()
    assert _run(files, None, tmp_path).exit_code == 2
    done = _run(files, judge, tmp_path, "--json", files["ours"])
    assert done.exit_code == 2 and f"--answers {files['ours']} and --json are one file" in done.output
    done = _run(files, judge, tmp_path, "--markdown", tmp_path / "out.json")
    assert done.exit_code == 2 and "--json and --markdown are one file" in done.output
    assert "there is no folder" in _run(files, judge, tmp_path, "--json", str(tmp_path / "no" / "out.json")).output


def test_any_reply_can_be_written_and_is_written_once_more(tmp_path):
    files = write_bench(tmp_path, 3)
    with fault_proxy(lambda body: chat_reply("8 9\n\ud83d half", "judge-1\ud83d")) as judge:
        for num_calls in (6, 6):
            options = ("--accept-model", r"judge-1\ud83d", "--markdown", tmp_path / "table.md")
            done = _run(files, judge, tmp_path, *options)
            assert done.exit_code == 0 and judge.totals() == {"good": num_calls}
    assert {one["text"] for one in _report(tmp_path)["judgements"]["ours"]} == {"8 9\n\ud83d half"}
    assert all("answered as judge-1\\ud83d" in text for text in (done.output, (tmp_path / "table.md").read_text()))


def test_a_result_that_cannot_be_written_is_an_error_after_its_numbers(tmp_path):
    files = write_bench(tmp_path, 3)
    with fault_proxy(lambda body: "8 9") as judge:
        done = _run(files, judge, tmp_path, "--json", str(tmp_path / ("x" * 300)))
    assert done.exit_code == 2 and "score in % of" in done.output and "Error: OSError: " in done.output


def test_the_result_says_what_was_sent(tmp_path):
    rule, judge = tmp_path / "rule.json", ScriptedJudge()
    words = {name: {"role": "Assistant", "prompt": "Rate."} for name in CATEGORIES}
    rule.write_text(json.dumps(words | {"judge": {"temperature": None, "send_seed": True}}))
    files = write_bench(tmp_path, 3)
    extra = {"temperature": 1, "max_tokens": None, "max_completion_tokens": 900, "seed": None}
    with fault_proxy(judge) as proxy:
        for options, shown, recorded in (
            ((), "the server's", (None, 1024, True, {})),
            (("--extra-body", json.dumps(extra)), "1", (1, None, False, extra)),
        ):
            done = _run(files, proxy, tmp_path, "--rule", str(rule), *options)
            settings = _report(tmp_path)["judge"]
            assert f"temperature {shown}, rule" in done.output
            assert tuple(settings[key] for key in ("temperature", "max_tokens", "send_seed", "extra_body")) == recorded
    names = {name for body in judge.asked for name in body} - {"model", "messages", "top_p"}
    assert names == {"max_tokens", "seed", "temperature", "max_completion_tokens"}
    assert {body.get("temperature") for body in judge.asked} == {None, 1}


@pytest.mark.parametrize("reply", ["", "nan 9", "I cannot say."])
def test_where_nothing_can_be_scored_nothing_is_done(tmp_path, reply):
    with fault_proxy(lambda body: reply) as judge:
        done = _run(write_bench(tmp_path, 3), judge, tmp_path, "--max-attempts", "1", "--max-tries", "1")
    assert done.exit_code == 1
    text = (tmp_path / "out.json").read_text()
    assert "NaN" not in text and json.loads(text)["models"]["ours"]["scores"]["all"] is None


def test_an_order_that_is_never_read_is_no_score_and_said(tmp_path):
    def first_reads(body):
        content = body["messages"][1]["content"]
        return "9 8" if content.index("A dog, number") < content.index("ours says") else "Well."

    with fault_proxy(first_reads) as judge:
        done = _run(write_bench(tmp_path, 6), judge, tmp_path, "--max-attempts", "1")
    assert done.exit_code == 1
    assert "are left out; reference_first: 6 of 6 read; candidate_first: 0 of 6 read." in done.output
    assert "6 of 6 questions lack a judgement in some order and are left out: 0, 1, 2, 3, 4, 5." in done.output
    assert _report(tmp_path)["models"]["ours"]["scores"]["all"] is None


def test_official_reviews_are_summed_up(tmp_path):
    rows = [{"question_id": id, "category": "conv", "tuple": pair, "content": "8, 6"}
            for id, pair in enumerate(([8, 6], [-1, -1]))]
    path = write_rows(tmp_path / "reviews.jsonl", rows)
    done = invoke("judge", "--official-reviews", path, "--json", tmp_path / "out.json")
    assert done.exit_code == 0 and "1 of them failed, 1 of these could be read after all" in done.output
    same = invoke("judge", "--official-reviews", path, "--json", path)
    assert same.exit_code == 2 and "are one file" in same.output and len(read_rows(path)) == 2
    assert _report(tmp_path)["reviews"][0]["scores"]["all"]["relative"] == 75


@pytest.mark.slow
def test_a_live_model_held_to_the_form_by_a_grammar(tmp_path):
    """Tests the way from files to tables; the scores of so small a judge mean nothing."""
    files = write_bench(tmp_path, 3)
    with serve_chat(num_slots=1) as url:
        options = ("--base-url", url, "--model", MODEL, "--cache", str(tmp_path / "cache"), "--concurrency", "1",
                   "--timeout-s", "300")
        held = {"grammar": GRAMMAR, "max_tokens": 24}
        done = _run(files, None, tmp_path, *options, "--extra-body", json.dumps(held))
        assert done.exit_code == 0, done.output
        report = _report(tmp_path)
        free = _run(files, None, tmp_path, *options, "--extra-body", '{"max_tokens": 12}', "--max-attempts", "2",
                    "--orders", "reference_first")
    model = report["models"]["ours"]
    assert model["num_scored"] == model["num_judgements"] == 6 and model["scores"]["all"]["num_questions"] == 3
    assert report["judge"]["served_as"] == {MODEL: 6} and report["judge"]["extra_body"] == held
    assert report["api"]["paid_calls"] == 6 and report["api"]["prompt_tokens"] > 6 * 150
    assert all(1 <= score <= 10 for one in report["judgements"]["ours"] for score in one["scores"])
    # Without the grammar it does as it likes: each judgement is read or counted, and none is lost.
    model = _report(tmp_path)["models"]["ours"]
    assert free.exit_code == (0 if model["num_scored"] else 1)  # no score is no success
    assert model["num_scored"] + sum(model["unparsable"].values()) == model["num_judgements"] == 3


@pytest.mark.slow
def test_the_shared_questions(tmp_path):
    """All 90, both orders: each judged once; shuffled files and faults give the same to the last digit."""
    files = shared_coco()
    answers = write_answers(tmp_path / "ours.jsonl", read_rows(files["questions"]), "ours")
    copies = {name: write_rows(tmp_path / path.name, read_rows(path)) for name, path in files.items()}
    with fault_proxy(ScriptedJudge()) as judge:
        assert _run(files | {"ours": answers}, judge, tmp_path).exit_code == 0
    first = _report(tmp_path)
    assert judge.totals() == {"good": first["api"]["paid_calls"]} and not judge.paid_twice()
    assert len({(one["question_id"], one["order"]) for one in first["judgements"]["ours"]}) == 180
    assert first["num_questions"] == dict.fromkeys(CATEGORIES, 30)
    for number, path in enumerate([*copies.values(), answers]):
        shuffle(path, number)
    # A machine that is busy for less than --timeout-s adds no time-out of its own.
    options = ("--concurrency", "32", "--timeout-s", "4")
    assert _same_under_faults(copies | {"ours": answers}, tmp_path, first, FAULTS, *options).total() > 20
