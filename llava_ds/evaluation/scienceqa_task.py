"""``tools/score --task scienceqa``: one file of predictions, or an ensemble of two, scored by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_ds.errors import ConfigError
from llava_ds.evaluation.scienceqa_columns import PAPER_ROWS, format_table, read_problems
from llava_ds.evaluation.scienceqa_ensemble_run import run_ensemble
from llava_ds.evaluation.scienceqa_predictions import read_predictions
from llava_ds.evaluation.scienceqa_score import decide, official_images, summarise, table_row, tell_others
from llava_ds.evaluation.scoring import Log, Score, ScoreRequest


def score_scienceqa(request: ScoreRequest, log: Log) -> Score:
    """Scores ``request.predictions``; with the problems' file by column, beside the paper's rows.

    Raises ConfigError for options that disagree, DataError for files that cannot be used, BackendUnavailableError where
    the endpoint left requests without a reply.
    """
    _check(request)
    predictions = read_predictions(request.predictions)
    report: dict[str, Any] = {"task": "scienceqa", "rule": "official" if request.official else "ours"}
    if not (request.problems and request.splits):
        report |= summarise(decide(predictions, None, request.official), None)
        return Score(report, [_failures(report)])
    problems, records = read_problems(request.problems, request.splits, request.split)
    answers = decide(predictions, problems, request.official)
    num_others = tell_others(request.predictions, predictions, problems, log)
    report |= {"split": request.split, "not_in_split": num_others}
    columns = official_images(predictions, problems) if request.official else problems
    scored, rows, paid = summarise(answers, columns), {}, None
    if request.ensemble and request.second:
        result = run_ensemble(request, request.second, problems, records, predictions, log)
        if isinstance(result, str):
            return Score(None, [result])
        parts = {"first": scored, "second": summarise(result.second, columns)}
        report["ensemble"] = result.details | {name: _without_predictions(part) for name, part in parts.items()}
        rows = {f"first: {request.predictions.name}": scored, f"second: {request.second.name}": parts["second"]}
        scored, paid = summarise(result.answers, columns), result.paid
    rows[request.ensemble or request.predictions.name] = scored
    table: dict[str, Sequence[float | None]] = {f"paper: {name}": row for name, row in PAPER_ROWS.items()}
    table |= {name: table_row(row) for name, row in rows.items()}
    lines = [*format_table(table), _counts(scored), _failures(scored)]
    return Score(report | scored, lines + ([paid] if paid else []))


def _check(request: ScoreRequest) -> None:
    """Raises ConfigError that lists all options that lack another."""
    lacking = {
        "--problems and --splits go together": bool(request.problems) != bool(request.splits),
        "--ensemble and --second go together": bool(request.ensemble) != bool(request.second),
        "--ensemble needs --problems and --splits": bool(request.ensemble) and not request.problems,
        "--ask-second needs --second, the file to write": request.ask_second and not request.second,
        "--shots needs --ask-second, which asks after them": request.num_shots is not None and not request.ask_second,
        "--dry-run needs --ask-second or --ensemble judge; nothing else asks a model": (
            request.endpoint.dry_run and not (request.ask_second or request.ensemble == "judge")
        ),
    }
    if any(lacking.values()):
        raise ConfigError("\n".join(advice for advice, holds in lacking.items() if holds))
    if request.ask_second and request.second and request.second.exists():
        raise ConfigError(f"{request.second} exists already; drop --ask-second to use it, or give another file")


def _without_predictions(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "predictions"}


def _counts(summary: Mapping[str, Any]) -> str:
    counts = {**summary["by_column"], "all": summary}
    return "correct: " + ", ".join(f"{name} {count['correct']}/{count['total']}" for name, count in counts.items())


def _failures(summary: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary["failed_by_reason"].items() if count)
    return f"without an answer: {summary['failed']} of {len(summary['predictions'])} ({reasons or 'none'})"
