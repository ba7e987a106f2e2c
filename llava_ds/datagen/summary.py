"""Reports and estimates as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ds.api.budget import format_usd
from llava_ds.api.dry_run import Estimate

_OF_PAIRS = {
    "num_pairs": "caption pairs read",
    "num_written": "samples written",
    "num_phrases": "noun phrases",
    "num_phrases_kept": "of them frequent enough",
    "num_phrases_cut": "of them in more captions than are taken",
    "num_without_phrase": "captions without a noun phrase",
}


def summarize_estimate(estimates: Mapping[str, Estimate]) -> str:
    """A line for each kind, and for all."""
    return "\n".join(f"{name}: {estimate.summary()}" for name, estimate in estimates.items())


def summarize_report(report: Mapping[str, Any], out: Path) -> str:
    """What was written, left out and refused, what has no answer, and how to go on."""
    lines = [f"left out {count}: {reason}" for reason, count in report["left_out_of_records"].items()]
    lines += [f"{report[name]} {what}" for name, what in _OF_PAIRS.items() if name in report]
    if "planned" in report:
        lines += _lines_of_samples(report)
    lines.append(f"wrote {out}")
    return "\n".join(lines)


def _lines_of_samples(report: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{name}: {report['produced'][name]} of {planned} samples, {report['rejected'][name]} rejected"
        for name, planned in report["planned"].items()
        if planned
    ]
    lines += [f"refused {count} replies: {reason}" for reason, count in report["refused_replies"].items()]
    lines += [
        f"no answer for {found['count']} samples: {problem}" + (f", e.g. {found['example']}" if ": " in problem else "")
        for problem, found in report["open"].items()
    ]
    lines.append(f"replies to these samples: {_tokens(report)}")
    lines.append(f"this run paid {_paid(report['runs'][-1])}")
    if len(report["runs"]) > 1:
        lines.append(f"all {len(report['runs'])} runs paid {_paid(report['spent'])}")
    if not report["is_complete"]:
        lines.append(
            "Unfinished: the same command goes on without paying twice for a reply. Its caps are of one run: it may "
            "spend as much again."
        )
    elif not any(report["produced"].values()):
        lines.append("No sample is good, and no training can use the file: see the reasons above and in rejects.jsonl.")
    return lines


def _tokens(counts: Mapping[str, Any]) -> str:
    cost = format_usd(counts["cost_usd"])
    return f"{counts['prompt_tokens']} + {counts['completion_tokens']} tokens, {cost}"


def _paid(counts: Mapping[str, Any]) -> str:
    text = f"for {counts['paid_calls']} calls: {_tokens(counts)}"
    if counts["num_estimated"]:
        text += f" (estimated for {counts['num_estimated']} without token counts, which caps take at their worst)"
    if counts["lost_calls"]:
        lost = f"{counts['max_lost_tokens']} tokens, {format_usd(counts['max_lost_cost_usd'])}"
        text += f", and at most {lost}, for {counts['lost_calls']} lost calls"
    return text
