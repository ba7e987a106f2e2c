"""Scores in the paper's form (Tables 4 and 5), beside the paper's rows, as text or Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_TITLES = {"conv": "Conversation", "detail": "Detail description", "complex": "Complex reasoning", "all": "All"}
_BENCHMARKS = {"llava_bench_coco": "LLaVA-Bench (COCO)", "llava_bench_in_the_wild": "LLaVA-Bench (In-the-Wild)"}
# arXiv 2304.08485v2, Tables 4 and 5, columns as in _TITLES.
_PAPER = {
    "llava_bench_coco": {
        "LLaVA, full data": ("83.1", "75.3", "96.5", "85.1"),
        "Detail + Complex": ("81.5", "73.3", "90.8", "81.9"),
        "Conv + 5% Detail + 10% Complex": ("81.0", "68.4", "91.5", "80.5"),
        "Conversation only": ("76.5", "59.8", "84.9", "73.8"),
        "No instruction tuning": ("22.0", "24.0", "18.5", "21.5"),
    },
    "llava_bench_in_the_wild": {
        "OpenFlamingo": ("19.3 ± 0.5", "19.0 ± 0.5", "19.1 ± 0.7", "19.1 ± 0.4"),
        "BLIP-2": ("54.6 ± 1.4", "29.1 ± 1.2", "32.9 ± 0.7", "38.1 ± 1.0"),
        "LLaVA": ("57.3 ± 1.9", "52.5 ± 6.3", "81.7 ± 1.8", "67.3 ± 2.0"),
        "LLaVA, one answer judged three times": ("58.8 ± 0.6", "49.2 ± 0.8", "81.4 ± 0.3", "66.7 ± 0.3"),
    },
}
Table = list[list[str]]


def score_table(report: dict[str, Any]) -> Table:
    """The paper's rows, ours with intervals, and ours by the official rule."""
    shown = list(next(iter(report["models"].values()))["scores"])
    table = [["", *(_TITLES.get(category, category) for category in shown)]]
    for name, values in _PAPER[report["benchmark"]].items():
        published = dict(zip(_TITLES, values, strict=True))
        table.append([f"paper: {name}", *(published.get(category, "") for category in shown)])
    for name, model in report["models"].items():
        table.append([name, *(_score(model["scores"][category]) for category in shown)])
        official = model["official_rule"]
        if official:
            table.append([f"{name}, official rule", *(_official(official.get(category)) for category in shown)])
    comparison = report.get("comparison")
    if comparison:
        label = f"{comparison['second']} - {comparison['first']}"
        table.append([label, *(_difference(comparison["scores"].get(category)) for category in shown)])
    return table


def as_text(table: Table) -> str:
    """Columns one below the other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(table: Table) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in table]
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def text_summary(report: dict[str, Any]) -> str:
    """What a person reads: warnings, the judge, the table, how to read it, the effect of order."""
    return _printable("\n".join([*_head(report), "", as_text(score_table(report)), "", *_notes(report)]))


def markdown_summary(report: dict[str, Any]) -> str:
    """The same in Markdown."""
    return _printable("\n\n".join([*_head(report), as_markdown(score_table(report)), *_notes(report)]) + "\n")


def _printable(text: str) -> str:
    """Half a surrogate pair, in a name that a server gave, is no text that can be written: its escape stands for it."""
    return text.encode(errors="backslashreplace").decode()


def _head(report: dict[str, Any]) -> Iterator[str]:
    judge = report["judge"]
    yield from (f"WARNING: {text}" for text in report["warnings"])
    yield (
        f"{_BENCHMARKS[report['benchmark']]}: {sum(report['num_questions'].values())} questions, "
        "score in % of the reference's"
    )
    served = ", ".join(judge["served_as"]) or "no one"
    temperature = "the server's" if judge["temperature"] is None else judge["temperature"]
    yield (
        f"judge {judge['model']} (answered as {served}) at {judge['base_url']}, temperature {temperature}, "
        f"rule {judge['rule']['file']} {judge['rule']['sha256'][:12]}, orders {' + '.join(judge['orders'])}, "
        f"{judge['repeats']} time(s)"
    )


def _notes(report: dict[str, Any]) -> Iterator[str]:
    bootstrap = report["bootstrap"]
    yield (
        f"[low, high]: {bootstrap['confidence']:.0%} interval over questions ({bootstrap['num_resamples']:,} bootstrap "
        f"resamples, percentiles, seed {bootstrap['seed']}); ±: standard deviation over repeats"
    )
    if any(model["official_rule"] for model in report["models"].values()):
        yield "official rule: reference first only, unreadable judgements averaged in as -1, means rounded first"
    for name, model in report["models"].items():
        bias = model["position_bias"]
        if bias:
            yield (
                f"{name}: standing first changes a score by {bias['points_for_first']:+.2f} points "
                f"{_interval(bias, 2)}; relative score by order: {_by_order(model['scores']['all'])}"
            )


def _by_order(score: dict[str, Any]) -> str:
    return ", ".join(
        f"{order} {value:.1f}" for order, value in score["by_order"].items() if value is not None
    )


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    std = score["repeats"]["std"]
    return f"{score['relative']:.1f}" + (f" ± {std:.1f}" if std is not None else "") + f" {_interval(score)}"


def _official(row: dict[str, Any] | None) -> str:
    return "-" if row is None or row["relative"] is None else f"{row['relative']:.1f}"


def _difference(score: dict[str, Any] | None) -> str:
    return "-" if score is None else f"{score['difference']:+.1f} {_interval(score)}"


def _interval(score: dict[str, Any], digits: int = 1) -> str:
    if score["interval"] is None:
        return "-"
    low, high = score["interval"]
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def review_summary(reviews: Sequence[dict[str, Any]]) -> str:
    """Official review files by both rules."""
    lines = []
    for review in reviews:
        lines.append(
            f"{review['file']}: {review['num_judgements']} judgements, {review['num_failed']} of them failed, "
            f"{review['num_recovered']} of these could be read after all"
        )
        table = [["", "official rule", "ours", "questions"]]
        for category, official in review["official_rule"].items():
            ours = review["scores"].get(category)
            shown = f"{ours['relative']:.1f} {_interval(ours)}" if ours else "-"
            table.append([category, _official(official), shown, str(ours["num_questions"] if ours else 0)])
        lines.append(as_text(table))
    return _printable("\n".join(lines))
