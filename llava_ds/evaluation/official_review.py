"""The official scripts' reading and summary of judgements, beside ours, to see what their rules do.

Sources: haotian-liu/LLaVA c121f04, llava/eval/eval_gpt_review_visual.py (``parse_score``) and summarize_gpt_review.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_ds.data.sources.llava_json import is_number
from llava_ds.errors import DataError
from llava_ds.evaluation.judge_parsing import MAX_SCORE, MIN_SCORE, parse_scores
from llava_ds.evaluation.question_rows import Row, read_id, read_rows
from llava_ds.evaluation.statistics import Bootstrap, relative_score

FAILED = (-1.0, -1.0)
Pair = tuple[float, float]


def official_scores(text: str) -> Pair:
    """``parse_score`` of the official scripts: two numbers in the first line, whatever they are, or (-1, -1)."""
    words = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        return (float(words[0]), float(words[1])) if len(words) == 2 else FAILED
    except ValueError:
        return FAILED


def official_summary(scores: Sequence[tuple[str | None, Pair]]) -> dict[str, dict[str, float | int | None]]:
    """``summarize_gpt_review.py`` over (category, scores): failures averaged in, means rounded before the division.

    ``relative`` is None where the official script divides by zero. A judge's "nan" or "inf" is a number to it; what
    comes of that is no number in JSON, and None here.
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for category, pair in scores:
        groups["all"].append(pair)
        if category is not None:
            groups[category].append(pair)
    summary: dict[str, dict[str, float | int | None]] = {}
    for key in sorted(groups):
        first, second = (round(mean, 3) for mean in np.asarray(groups[key]).mean(0).tolist())
        summary[key] = {
            "relative": _rounded(second / first * 100) if first else None,
            "first_x10": _rounded(first * 10),
            "second_x10": _rounded(second * 10),
            "num_judgements": len(groups[key]),
            "num_failed": groups[key].count(FAILED),
        }
    return summary


def _rounded(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None


def summarize_reviews(path: Path, bootstrap: Bootstrap) -> dict[str, Any]:
    """An official review file (JSONL with ``tuple``, or ``score`` of older ones) by the official rule and by ours.

    Ours takes a stored pair from 1 to 10; where it is none, the judge's text is read again, and what stays unread is
    left out and counted. One id in two categories is two questions. Raises DataError that names the line.
    """
    stored: list[tuple[str | None, Pair]] = []
    ours: dict[str, dict[tuple[str | None, str], list[Pair]]] = defaultdict(lambda: defaultdict(list))
    counts = {"num_judgements": 0, "num_failed": 0, "num_recovered": 0}
    excluded: list[str] = []
    for row in read_rows(path, is_sent=False):
        category, id, pair = _category(row), read_id(row.record, row.where), _stored_pair(row)
        stored.append((category, pair))
        counts["num_judgements"] += 1
        read = pair if _is_valid(pair) else _read_again(row)
        counts["num_failed"] += not _is_valid(pair)
        counts["num_recovered"] += read is not None and not _is_valid(pair)
        if read is None:
            excluded.append(id)
            continue
        for key in {"all", category or "all"}:
            ours[key][category, id].append(read)
    return {
        "file": str(path), **counts, "excluded": excluded, "official_rule": official_summary(stored),
        "scores": {key: _score(list(ours[key].values()), bootstrap) for key in sorted(ours)},
    }


def _score(judgements: Sequence[Sequence[Pair]], bootstrap: Bootstrap) -> dict[str, Any]:
    """A question that was judged several times counts once, by its mean."""
    rows = np.array([np.mean(pairs, axis=0) for pairs in judgements])
    return {
        "relative": float(relative_score(rows.mean(0))), "interval": bootstrap.interval(rows, relative_score),
        "num_questions": len(rows),
    }


def _category(row: Row) -> str | None:
    category = row.record.get("category")
    if category is not None and not isinstance(category, str):
        raise DataError(f"{row.where}: 'category' must be text, got {category!r:.80}")
    return category


def _stored_pair(row: Row) -> Pair:
    pair = row.record.get("tuple", row.record.get("score"))
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_number, pair)):
        raise DataError(f"{row.where}: expected 'tuple' (or 'score') with two finite numbers, got {pair!r:.80}")
    return float(pair[0]), float(pair[1])


def _is_valid(pair: Pair) -> bool:
    return all(MIN_SCORE <= score <= MAX_SCORE for score in pair)


def _read_again(row: Row) -> Pair | None:
    try:
        return parse_scores(str(row.record.get("content", row.record.get("text", ""))))
    except DataError:
        return None
