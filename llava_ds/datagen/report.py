"""``report.json``: what a generation wrote and refused, and what all runs in its folder paid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava_ds.api.budget import Prices
from llava_ds.api.report import ApiReport
from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.records import Records
from llava_ds.datagen.results import Result, sum_tokens
from llava_ds.errors import ConfigError

_SPENT = ("calls", "paid_calls", "lost_calls", "num_estimated", "prompt_tokens", "completion_tokens", "cost_usd",
          "max_lost_tokens", "max_lost_cost_usd")


def count_results(results: Sequence[Result], records: Records, prices: Prices) -> dict[str, Any]:
    """Samples by kind and reason. ``open`` ones have no answer yet: a count and one example for each problem.

    ``prompt_tokens``, ``completion_tokens`` and ``cost_usd`` are of the replies to these samples, whenever they were
    paid, at ``prices``.
    """
    tokens = sum_tokens([given for result in results for given in result.replies])
    refused = Counter(
        given.reason.partition(":")[0] for result in results for given in result.replies if given.reason is not None
    )
    return {
        "is_complete": not any(result.is_open for result in results),
        "num_images": len(records.images),
        "left_out_of_records": dict(sorted(records.left_out.items())),
        "planned": _by_kind(results),
        "produced": _by_kind([result for result in results if result.pairs]),
        "rejected": _by_kind([result for result in results if result.problem and not result.is_open]),
        "num_open": sum(result.is_open for result in results),
        "open": _by_problem([str(result.problem) for result in results if result.is_open]),
        "refused_replies": dict(refused.most_common()),
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "cost_usd": prices.cost_usd(tokens),
    }


def read_report(file: Path) -> dict[str, Any]:
    """The report of the run before; empty where there is none.

    Raises ConfigError when the runs in it cannot be read: what they paid would be forgotten.
    """
    if not file.is_file():
        return {}
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        _sum_spent(report.get("runs", []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error!r}); move it away to go on without what earlier runs paid"
        ) from error
    return dict(report)


def add_run(before: Mapping[str, Any], run: ApiReport) -> dict[str, Any]:
    """``runs``: those of the report ``before`` and this one, the last; ``spent``: what they paid together."""
    runs = [*before.get("runs", []), {"ended": datetime.now(UTC).isoformat(timespec="seconds"), **run.to_json()}]
    return {"runs": runs, "spent": _sum_spent(runs)}


def _sum_spent(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums; None where one of them is not known."""
    columns = {name: [run[name] for run in runs] for name in _SPENT}
    return {name: None if None in column else sum(column) for name, column in columns.items()}


def _by_kind(results: Sequence[Result]) -> dict[str, int]:
    counts = Counter(result.sample.kind.name for result in results)
    return {name: counts[name] for name in KINDS}


def _by_problem(problems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By what comes before the details: ``budget``, ``gave up: http_500``, ``refused: http_400``."""
    kinds = [": ".join(problem.split(": ", 2)[:2]) for problem in problems]
    examples = dict(zip(reversed(kinds), reversed(problems), strict=True))
    return {kind: {"count": count, "example": examples[kind]} for kind, count in Counter(kinds).most_common()}
