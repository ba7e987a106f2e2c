"""Scores answers to ScienceQA problems: decisions, accuracies by column, and what had no answer for which reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import DataError
from llava_ds.evaluation.scienceqa_answers import MISSING, REASONS, Answer, extract_answer, official_answer
from llava_ds.evaluation.scienceqa_columns import COLUMNS, Problem
from llava_ds.evaluation.scienceqa_predictions import Prediction


def decide(
    predictions: Mapping[str, Prediction], problems: Mapping[str, Problem] | None, official: bool = False
) -> dict[str, Answer]:
    """The answer to each problem, in their order; of each prediction, where there are no problems.

    Raises DataError when the predictions are for none of the problems.
    """
    if problems is None:
        return {pid: extract(prediction.text, None, official) for pid, prediction in predictions.items()}
    if not predictions.keys() & problems.keys():
        raise DataError(
            f"none of the {len(predictions)} predictions is for one of the {len(problems)} problems of the split: "
            f"ids {', '.join(list(predictions)[:3])}, problems {', '.join(list(problems)[:3])}; name the split "
            "that they are for with --split"
        )
    return {
        pid: extract(predictions[pid].text, problem, official) if pid in predictions else Answer(-1, MISSING)
        for pid, problem in problems.items()
    }


def tell_others(
    file: Path, predictions: Mapping[str, Prediction], problems: Mapping[str, Problem], log: Callable[[str], None]
) -> int:
    """How many predictions of ``file`` are for none of the problems; they are named if there are any."""
    others = [pid for pid in predictions if pid not in problems]
    if others:
        log(
            f"{file}: {len(others)} predictions are left out; they are for no problem of the split, the first: "
            f"{', '.join(others[:5])}"
        )
    return len(others)


def extract(text: str, problem: Problem | None, official: bool) -> Answer:
    """By the official rule, or ours."""
    if official:
        return official_answer(text, *([len(problem.choices)] if problem else []))
    return extract_answer(text, problem.choices if problem else None)


def official_images(predictions: Mapping[str, Prediction], problems: Mapping[str, Problem]) -> dict[str, Problem]:
    """The problems with the official scorer's idea of IMG: the image placeholder stands in the prompt that was asked.

    A problem without a prediction has none. Where the file holds no prompts, the problem says it.
    """

    def columns(pid: str, problem: Problem) -> frozenset[str]:
        prompt = predictions[pid].prompt if pid in predictions else ""
        if prompt is None:
            return problem.columns
        return problem.columns - {"IMG"} | ({"IMG"} if IMAGE_PLACEHOLDER in prompt else frozenset())

    return {pid: Problem(problem.choices, problem.answer, columns(pid, problem)) for pid, problem in problems.items()}


def summarise(answers: Mapping[str, Answer], problems: Mapping[str, Problem] | None) -> dict[str, Any]:
    """``predictions`` {id: index of the choice or -1}, ``failed`` (how many are -1) and ``failed_by_reason``.

    With the problems also ``correct``, ``total``, ``accuracy`` in percent, and ``by_column`` with the same three of
    each column; the accuracy of no problems is None. A failed answer is a wrong one.
    """
    summary = {
        "predictions": {pid: answer.index for pid, answer in answers.items()},
        "failed": sum(answer.reason is not None for answer in answers.values()),
        "failed_by_reason": count_reasons(answers),
    }
    if problems is None:
        return summary
    hits = {pid: answers[pid].index == problem.answer for pid, problem in problems.items()}
    by_column = {name: [hits[pid] for pid in problems if name in problems[pid].columns] for name in COLUMNS}
    return {
        **_accuracy(list(hits.values())),
        **summary,
        "by_column": {name: _accuracy(column) for name, column in by_column.items()},
    }


def count_reasons(answers: Mapping[str, Answer]) -> dict[str, int]:
    """How many answers there are not, for each of ``REASONS``."""
    reasons = Counter(answer.reason for answer in answers.values())
    return {reason: reasons[reason] for reason in REASONS}


def _accuracy(hits: list[bool]) -> dict[str, float | int | None]:
    return {
        "accuracy": 100 * sum(hits) / len(hits) if hits else None,
        "correct": sum(hits),
        "total": len(hits),
    }


def table_row(summary: Mapping[str, Any]) -> list[float | None]:
    """The accuracies of a summary as a row of the paper's table."""
    return [*(summary["by_column"][name]["accuracy"] for name in COLUMNS), summary["accuracy"]]
