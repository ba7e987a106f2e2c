"""Numbers of tools/judge against hand-computed ones; intervals against their meaning, by simulation."""

import json
import random
import statistics as standard
from dataclasses import replace

import numpy as np
import pytest

from llava_ds.errors import DataError
from llava_ds.evaluation.judge import Judgement, Slot
from llava_ds.evaluation.judge_summary import categories, compare, position_bias, question_scores, summarize
from llava_ds.evaluation.judge_tables import as_markdown, as_text, review_summary, score_table
from llava_ds.evaluation.llava_bench import Question
from llava_ds.evaluation.official_review import FAILED, official_scores, official_summary, summarize_reviews
from llava_ds.evaluation.statistics import (
    Bootstrap,
    mean_and_std,
    only_mean,
    relative_difference,
    relative_score,
)
from tests.helpers.bench import write_rows

BOOTSTRAP = Bootstrap(num_resamples=500)
FIRST, SECOND = "reference_first", "candidate_first"


def _questions(*kinds: str) -> list[Question]:
    return [Question(str(id), kind, "?", "", "") for id, kind in enumerate(kinds)]


def _judgement(id, scores, order=FIRST, repeat=0, problem=None, category="conv", was_judged=True, text="", answers="a"):
    slot = Slot(answers, str(id), category, order, repeat, "Assistant")
    text = text or (f"{scores[0]:g} {scores[1]:g}\n." if scores else "Well.")
    return Judgement(slot, scores, problem, was_judged, text, ("judge",), "id", 1, False)


def test_a_questions_score_is_the_mean_over_orders_of_the_mean_over_repeats():
    judgements = [
        _judgement(0, (8, 4), FIRST, 0), _judgement(0, (10, 6), FIRST, 1),
        _judgement(0, (5, 9), SECOND, 0), _judgement(0, None, SECOND, 1, "no number"),
        _judgement(1, None, FIRST, 0, "no number"), _judgement(1, (7, 7), SECOND, 0),
        _judgement(2, None, FIRST, 0, "empty"),
    ]
    # 0: ((8 + 10) / 2 + 5) / 2, ((4 + 6) / 2 + 9) / 2; 1 and 2 lack an order.
    assert question_scores(judgements) == {"0": (7.0, 7.0)}
    assert question_scores(judgements[5:6]) == {"1": (7.0, 7.0)}  # where one order was asked, none is lacking


def test_a_lost_order_moves_no_score():
    """Every answer that stands first gets 9, the other 8: no order alone says that both are as good."""
    questions = _questions("conv", "conv", "conv")
    judgements = [_judgement(id, pair, order) for id in range(3) for order, pair in ((FIRST, (9, 8)), (SECOND, (8, 9)))]
    lost = [replace(one, scores=None, problem="no number") if one.slot.order == SECOND else one for one in judgements]
    assert summarize(questions, judgements, BOOTSTRAP)["scores"]["all"]["relative"] == 100
    some = summarize(questions, [*judgements[:4], *lost[4:]], BOOTSTRAP)
    assert some["scores"]["all"]["relative"] == 100 and some["scores"]["all"]["num_questions"] == 2
    assert some["excluded_questions"] == ["2"] and some["num_scored_by_order"] == {FIRST: 3, SECOND: 2}
    none = summarize(questions, lost, BOOTSTRAP)
    assert none["scores"] == {"conv": None, "all": None} and none["num_scored_by_order"] == {FIRST: 3, SECOND: 0}
    # Orders that were read in different repeats: a score, and no repeat that has one of its own.
    apart = [_judgement(0, (9, 8), FIRST, 0), _judgement(0, None, SECOND, 0, "empty"),
             _judgement(0, None, FIRST, 1, "empty"), _judgement(0, (8, 9), SECOND, 1)]
    found = summarize(questions[:1], apart, BOOTSTRAP)["scores"]["all"]
    assert found["relative"] == 100 and found["repeats"] == {"relative": [], "mean": None, "std": None}


def test_everything_about_one_model_by_hand():
    questions = _questions("conv", "conv", "detail", "complex")
    judgements = [
        _judgement(0, (8, 4), FIRST, 0), _judgement(0, (8, 6), SECOND, 0),
        _judgement(0, (8, 6), FIRST, 1), _judgement(0, (8, 8), SECOND, 1),
        _judgement(1, (10, 9), FIRST, 0), _judgement(1, (10, 10), SECOND, 0),
        _judgement(1, (10, 10), FIRST, 1), _judgement(1, (10, 9), SECOND, 1),
        _judgement(2, (5, 5), FIRST, 0, category="detail"),
        _judgement(2, (5, 5), SECOND, 0, category="detail"),
        _judgement(2, None, FIRST, 1, "no number", "detail"),
        _judgement(2, None, SECOND, 1, "budget", "detail", was_judged=False, text=" "),
        _judgement(3, None, FIRST, 0, "one number", "complex"),
    ]
    found = summarize(questions, judgements, BOOTSTRAP)
    conv = found["scores"]["conv"]
    # (8 + 10) / 2, (6 + 9.5) / 2
    assert (conv["reference"], conv["candidate"], conv["num_questions"]) == (9.0, 7.75, 2)
    assert conv["relative"] == 7.75 / 9 * 100
    assert conv["by_order"] == {FIRST: 7.25 / 9 * 100, SECOND: 8.25 / 9 * 100}
    assert conv["repeats"]["relative"] == [7.25 / 9 * 100, 8.25 / 9 * 100]
    assert conv["repeats"]["std"] == pytest.approx(1 / 9 * 100 / 2**0.5)
    assert found["scores"]["detail"]["relative"] == 100 and found["scores"]["detail"]["interval"] is None
    assert found["scores"]["detail"]["repeats"] == {"relative": [100.0], "mean": 100.0, "std": None}
    assert found["scores"]["complex"] is None
    every = found["scores"]["all"]
    assert every["num_questions"] == 3 and every["relative"] == pytest.approx((6 + 9.5 + 5) / (8 + 10 + 5) * 100)
    assert every["relative"] != pytest.approx((conv["relative"] + 100) / 2)
    assert (found["num_judgements"], found["num_scored"]) == (13, 10)
    assert found["unparsable"] == {"no number": 1, "one number": 1} and found["not_judged"] == {"budget": 1}
    assert found["excluded_questions"] == ["3"] and found["partly_judged_questions"] == ["2"]
    # Reference first alone: 4 6 9 10 5, and -1 for the two that were judged and cannot be read.
    official = found["official_rule"]
    assert official["conv"] == {
        "relative": 80.6, "first_x10": 90.0, "second_x10": 72.5, "num_judgements": 4, "num_failed": 0,
    }
    assert official["detail"]["relative"] == 100.0 and official["detail"]["first_x10"] == 20.0
    assert official["complex"] == {
        "relative": 100.0, "first_x10": -10.0, "second_x10": -10.0, "num_judgements": 1, "num_failed": 1,
    }
    assert official["all"]["num_failed"] == 2 and official["all"]["num_judgements"] == 7


def test_position_bias_by_hand():
    judgements = [
        _judgement(0, (9, 5), FIRST), _judgement(0, (7, 6), SECOND),  # reference gains 2, candidate 1
        _judgement(1, (8, 8), FIRST), _judgement(1, (8, 8), SECOND),
        _judgement(2, (10, 1), FIRST), _judgement(2, None, SECOND, problem="empty"),
    ]
    found = position_bias(judgements, BOOTSTRAP)
    assert found["points_for_first"] == 0.75 and found["num_questions"] == 2 and found["interval"] == (0.0, 1.5)
    assert position_bias(judgements[:1], BOOTSTRAP) is None
    assert position_bias(judgements[:2], BOOTSTRAP) == {"points_for_first": 1.5, "interval": None, "num_questions": 1}


def test_comparison_pairs_questions():
    questions = _questions("conv", "detail", "conv", "conv")
    one = [_judgement(id, (10, score)) for id, score in enumerate((5, 6, 7))]
    other = [_judgement(id, (10, score), answers="b") for id, score in ((0, 6), (1, 7), (2, 8), (3, 1))]
    found = compare(questions, one, other, BOOTSTRAP)
    assert found["all"]["num_questions"] == 3 and found["all"]["difference"] == pytest.approx(10)
    assert found["all"]["interval"] == pytest.approx((10, 10))  # paired: it is 10 on every question
    assert found["detail"]["num_questions"] == 1 and found["detail"]["interval"] is None and "complex" not in found


def test_order_of_judgements_means_nothing():
    questions = _questions(*["conv", "detail", "complex"] * 5)
    rng = random.Random(0)
    judgements = [
        _judgement(question.id, (rng.randint(1, 10), rng.randint(1, 10)), order, repeat, category=question.category)
        for question in questions for order in (FIRST, SECOND) for repeat in range(3)
    ]
    expected = summarize(questions, judgements, BOOTSTRAP)["scores"]
    for _ in range(3):
        by_question = list(judgements)
        rng.shuffle(by_question)
        by_question.sort(key=lambda one: (one.slot.order != FIRST, one.slot.repeat))
        assert summarize(questions, by_question, BOOTSTRAP)["scores"] == expected


def test_other_categories_stand_before_all():
    assert categories(_questions("odd", "complex", "conv")) == ["conv", "complex", "odd", "all"]


def test_mean_and_std():
    assert mean_and_std([2.0, 4.0, 9.0]) == (5.0, standard.stdev([2, 4, 9])) and mean_and_std([3.0]) == (3.0, None)
    assert mean_and_std([]) == (None, None)


def test_bootstrap_is_a_function_of_its_seed():
    rows = np.random.default_rng(0).uniform(1, 10, (90, 2))
    low, high = Bootstrap(1000, seed=1).interval(rows, relative_score)
    assert (low, high) == Bootstrap(1000, seed=1).interval(rows, relative_score)
    assert (low, high) != Bootstrap(1000, seed=2).interval(rows, relative_score)
    assert low < rows[:, 1].mean() / rows[:, 0].mean() * 100 < high
    assert Bootstrap(1000).interval(rows[:1], relative_score) is None


def test_bootstrap_interval_against_resamples_drawn_one_by_one():
    rows = np.random.default_rng(3).uniform(1, 10, (30, 2))
    found = Bootstrap(20_000).interval(rows, relative_score)
    rng = random.Random(5)
    drawn = []
    for _ in range(4000):
        sample = [rows[rng.randrange(30)] for _ in range(30)]
        drawn.append(sum(row[1] for row in sample) / sum(row[0] for row in sample) * 100)
    expected = np.quantile(drawn, [0.025, 0.975])
    assert found == pytest.approx(expected, abs=1.5)  # the draws' own error is about 0.5; the interval is 27 wide


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(7)

    def draw(num_questions: int) -> np.ndarray:
        """Reference and candidate of two models; what a question is worth is common to all four."""
        worth = rng.normal(7, 1.5, (num_questions, 1))
        return np.clip(worth + rng.normal([1, 0, 1, -1], 1, (num_questions, 4)), 1, 10)

    truth = draw(400_000).mean(0)
    assert relative_score(truth) == pytest.approx(88, abs=1) and relative_difference(truth) == pytest.approx(-12, abs=1)
    num_covered = {relative_score: 0, relative_difference: 0}
    for trial in range(300):
        rows = draw(60)
        for statistic in num_covered:
            low, high = Bootstrap(400, seed=trial).interval(rows, statistic)
            num_covered[statistic] += low <= statistic(truth) <= high
    assert all(0.9 <= count / 300 <= 0.99 for count in num_covered.values()), num_covered


def test_only_mean():
    assert only_mean(np.array([[3.0], [4.0]])).tolist() == [3.0, 4.0]


def test_the_official_summary_by_hand():
    """-1 is averaged in, and means are rounded to three decimals before they are divided."""
    detail = [("detail", pair) for pair in ((7.0, 6.0), (6.0, 6.0), (9.0, 1.0))]
    rows = [("conv", (9.0, 8.0)), ("conv", FAILED), *detail]
    found = official_summary(rows)
    assert list(found) == ["all", "conv", "detail"]
    assert found["conv"] == {
        "relative": 87.5, "first_x10": 40.0, "second_x10": 35.0, "num_judgements": 2, "num_failed": 1,
    }
    assert found["detail"]["relative"] == round(4.333 / 7.333 * 100, 1) == 59.1
    assert found["detail"]["first_x10"] == 73.3 and found["all"]["relative"] == round(4.0 / 6.0 * 100, 1)
    assert official_summary([("conv", (0.0, 1.0))])["conv"]["relative"] is None  # the official script ends here
    odd = official_summary([("conv", official_scores("nan 9")), ("conv", (9.0, 8.0))])["conv"]
    assert odd == {"relative": None, "first_x10": None, "second_x10": 85.0, "num_judgements": 2, "num_failed": 0}


def test_official_reviews_by_both_rules(tmp_path):
    rows = [
        {"question_id": 0, "category": "conv", "tuple": [9, 8], "content": "9 8\nGood."},
        {"question_id": 1, "category": "conv", "tuple": [-1, -1], "content": "8, 8\nGood."},
        {"question_id": 2, "category": "detail", "tuple": [-1, -1], "content": "Good."},
        {"question_id": 3, "category": "detail", "tuple": [5, 6], "content": "5 6\nGood."},
        {"question_id": 3, "category": "detail", "tuple": [5, 4], "content": "5 4\nGood."},
    ]
    found = summarize_reviews(write_rows(tmp_path / "reviews.jsonl", rows), BOOTSTRAP)
    assert (found["num_judgements"], found["num_failed"], found["num_recovered"]) == (5, 2, 1)
    assert found["excluded"] == ["2"]
    assert found["official_rule"]["conv"]["relative"] == 87.5 and found["official_rule"]["all"]["relative"] == 94.1
    assert found["scores"]["conv"]["relative"] == pytest.approx(16 / 17 * 100)
    assert found["scores"]["detail"]["relative"] == 100 and found["scores"]["detail"]["num_questions"] == 1
    text = review_summary([found])
    assert "5 judgements, 2 of them failed, 1 of these could be read after all" in text and "87.5" in text
    older = write_rows(tmp_path / "older.jsonl", [{"question_id": 7, "text": "8 9\n.", "score": [8.0, 9.0]}])
    assert summarize_reviews(older, BOOTSTRAP)["official_rule"]["all"]["relative"] == 112.5
    text = review_summary([summarize_reviews(older, BOOTSTRAP)])
    assert text.splitlines()[-1].split() == ["all", "112.5", "112.5", "-", "1"]  # one question has no interval


def test_one_id_in_two_categories_of_reviews_is_two_questions(tmp_path):
    rows = [{"question_id": 0, "category": category, "tuple": [8, score], "content": "half \ud83d"}
            for category, score in (("conv", 6), ("llava_bench_conv", 2), ("conv", 8))]
    found = summarize_reviews(write_rows(tmp_path / "reviews.jsonl", rows), BOOTSTRAP)["scores"]
    assert {key: found[key]["num_questions"] for key in found} == {"all": 2, "conv": 1, "llava_bench_conv": 1}
    assert found["all"]["relative"] == pytest.approx((7 + 2) / 16 * 100)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"tuple": [8.0]}, "expected 'tuple'"), ({"tuple": [True, True]}, "two finite numbers"),
        ({"tuple": [float("nan"), 8]}, "two finite numbers"), ({"tuple": [10**400, 1]}, "two finite numbers"),
        ({"question_id": None}, "'question_id' must be"), ({"category": 3}, "'category' must be text, got 3"),
        ({"category": ["x"]}, "'category' must be text"),
    ],
)
def test_bad_reviews(tmp_path, change, part):
    good = {"question_id": 7, "category": "conv", "tuple": [8, 9]}
    path = write_rows(tmp_path / "bad.jsonl", [good, good | change])
    with pytest.raises(DataError, match=f"bad.jsonl:2: .*{part}"):
        summarize_reviews(path, BOOTSTRAP)


def _report(**changes):
    questions = _questions("conv", "detail", "complex")
    models = {
        name: summarize(
            questions, [_judgement(id, (8, score), category=question.category, answers=name)
                        for id, (question, score) in enumerate(zip(questions, scores, strict=True))], BOOTSTRAP,
        )
        for name, scores in {"a|b": (4, 6, 8), "c": (8, 8, 8)}.items()
    }
    return {"benchmark": "llava_bench_coco", "models": models} | changes


def test_tables_have_the_papers_rows_and_ours():
    table = score_table(_report())
    assert table[0] == ["", "Conversation", "Detail description", "Complex reasoning", "All"]
    assert table[1] == ["paper: LLaVA, full data", "83.1", "75.3", "96.5", "85.1"]
    assert table[6] == ["a|b", "50.0 -", "75.0 -", "100.0 -", "75.0 [50.0, 100.0]"]
    assert table[7] == ["a|b, official rule", "50.0", "75.0", "100.0", "75.0"]
    wild = score_table(_report(benchmark="llava_bench_in_the_wild"))
    assert wild[3] == ["paper: LLaVA", "57.3 ± 1.9", "52.5 ± 6.3", "81.7 ± 1.8", "67.3 ± 2.0"]
    lines = as_markdown(table).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |" and lines[7].startswith("| a\\|b | 50.0 - | 75.0 - |")
    assert len({len(line) for line in as_text(table).splitlines()}) == 1


def test_a_report_is_plain_json():
    assert json.loads(json.dumps(_report()))["models"]["c"]["scores"]["all"]["relative"] == 100
