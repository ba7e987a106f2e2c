"""From judgements to numbers: relative scores with intervals, spread, the effect of order, what was left out.

A question's scores are the mean over orders of the mean over repeats, of the judgements that could be read; it has none
unless every order has one. A relative score is 100 x the mean of candidates' scores / the mean of references' scores,
over questions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llava_ds.evaluation.judge import Judgement
from llava_ds.evaluation.llava_bench import Question
from llava_ds.evaluation.official_review import official_scores, official_summary
from llava_ds.evaluation.statistics import Bootstrap, mean_and_std, only_mean, relative_difference, relative_score

CATEGORIES = ("conv", "detail", "complex", "all")
Scores = dict[str, tuple[float, float]]  # reference, candidate by question id


def summarize(questions: Sequence[Question], judgements: Sequence[Judgement], bootstrap: Bootstrap) -> dict[str, Any]:
    """All numbers of one model; ``scores`` by category."""
    scores = question_scores(judgements)
    orders = {order: [one for one in judgements if one.slot.order == order] for order in _seen(judgements, "order")}
    repeats = [[one for one in judgements if one.slot.repeat == number] for number in _seen(judgements, "repeat")]
    complete = {one.slot.question_id for one in judgements} - {
        one.slot.question_id for one in judgements if one.scores is None
    }
    return {
        "scores": {
            category: _category(_ids(questions, category), scores, orders, repeats, bootstrap)
            for category in categories(questions)
        },
        "position_bias": position_bias(judgements, bootstrap),
        "num_judgements": len(judgements),
        "num_scored": sum(one.scores is not None for one in judgements),
        "num_scored_by_order": {order: sum(one.scores is not None for one in ones) for order, ones in orders.items()},
        "unparsable": _count(one.problem for one in judgements if one.scores is None and one.was_judged),
        "not_judged": _count(_kind(one.problem) for one in judgements if not one.was_judged),
        "asked_again": sum(one.attempts > 1 for one in judgements),
        "excluded_questions": [question.id for question in questions if question.id not in scores],
        "partly_judged_questions": [
            question.id for question in questions if question.id in scores and question.id not in complete
        ],
        "official_rule": _official(judgements),
    }


def compare(
    questions: Sequence[Question], first: Sequence[Judgement], second: Sequence[Judgement], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """The second model's relative score less the first's by category, over questions that both have scores of."""
    one, other = question_scores(first), question_scores(second)
    found = {}
    for category in categories(questions):
        rows = _rows({id: one[id] + other[id] for id in one.keys() & other.keys()}, _ids(questions, category))
        if len(rows):
            found[category] = {
                "difference": float(relative_difference(rows.mean(0))),
                "interval": bootstrap.interval(rows, relative_difference),
                "num_questions": len(rows),
            }
    return found


def categories(questions: Sequence[Question]) -> list[str]:
    """The paper's categories, ``all`` last; others that the questions have stand before it."""
    present = {question.category for question in questions}
    return [*(name for name in CATEGORIES if name in present), *sorted(present - set(CATEGORIES)), "all"]


def question_scores(judgements: Sequence[Judgement]) -> Scores:
    """Scores of the questions that have a judgement which could be read in each order that stands in ``judgements``.

    One order alone would score the place that an answer stood in.
    """
    num_orders = len(_seen(judgements, "order"))
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for one in judgements:
        if one.scores is not None:
            found[one.slot.question_id][one.slot.order].append(one.scores)
    return {
        id: tuple(np.mean([np.mean(pairs, axis=0) for pairs in orders.values()], axis=0).tolist())
        for id, orders in found.items()
        if len(orders) == num_orders
    }


def position_bias(judgements: Sequence[Judgement], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """Points that an answer gains by standing first, over questions that were scored in both orders; else None.

    For each question: the mean over both answers of (score when first - score when second).
    """
    first = question_scores([one for one in judgements if one.slot.order == "reference_first"])
    second = question_scores([one for one in judgements if one.slot.order == "candidate_first"])
    both = [one.slot.question_id for one in judgements if one.slot.question_id in first.keys() & second.keys()]
    gains = {id: ((first[id][0] - second[id][0]) + (second[id][1] - first[id][1])) / 2 for id in both}
    if not gains:
        return None
    rows = np.array(list(gains.values()))[:, None]
    return {
        "points_for_first": float(rows.mean()),
        "interval": bootstrap.interval(rows, only_mean),
        "num_questions": len(rows),
    }


def _category(
    ids: Sequence[str],
    scores: Scores,
    orders: Mapping[str, Sequence[Judgement]],
    repeats: Sequence[Sequence[Judgement]],
    bootstrap: Bootstrap,
) -> dict[str, Any] | None:
    """The numbers of one category; None where no question of it could be scored."""
    rows = _rows(scores, ids)
    if not len(rows):
        return None
    by_repeat = [value for value in (_relative(one, ids) for one in repeats) if value is not None]
    mean, std = mean_and_std(by_repeat)
    return {
        "relative": float(relative_score(rows.mean(0))),
        "interval": bootstrap.interval(rows, relative_score),
        "reference": float(rows[:, 0].mean()),
        "candidate": float(rows[:, 1].mean()),
        "num_questions": len(rows),
        "by_order": {order: _relative(one, ids) for order, one in orders.items()},
        "repeats": {"relative": by_repeat, "mean": mean, "std": std},
    }


def _relative(judgements: Sequence[Judgement], ids: Sequence[str]) -> float | None:
    rows = _rows(question_scores(judgements), ids)
    return float(relative_score(rows.mean(0))) if len(rows) else None


def _rows(scores: Mapping[str, tuple[float, ...]], ids: Sequence[str]) -> np.ndarray:
    """Scores of questions by ascending id, [N, K]."""
    return np.array([scores[id] for id in ids if id in scores])


def _ids(questions: Sequence[Question], category: str) -> list[str]:
    return [question.id for question in questions if category in ("all", question.category)]


def _seen(judgements: Sequence[Judgement], name: str) -> list[Any]:
    return list(dict.fromkeys(getattr(one.slot, name) for one in judgements))


def _count(problems: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(str(problem) for problem in problems).items()))


def _kind(problem: str | None) -> str:
    """``gave up: http_500`` of ``gave up: http_500: what the server said (try 6)``."""
    return ": ".join(str(problem).split(": ")[:2])


def _official(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """The official summary of these judgements, reference first; a last reply that it cannot read is (-1, -1)."""
    rows = [
        (one.slot.category, official_scores(one.text))
        for one in judgements
        if one.was_judged and one.slot.order == "reference_first"
    ]
    return official_summary(rows) if rows else None
