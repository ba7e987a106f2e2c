"""Reports and estimates as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    lines += [f"no answer for {count} samples: {problem}" for problem, count in report["open"].items()]
    lines.append(
        f"all replies: {report['prompt_tokens']} + {report['completion_tokens']} tokens, ${report['cost_usd']:.4f}; "
        f"this run paid ${report['this_run']['cost_usd']:.4f} for {report['this_run']['paid_calls']} calls"
    )
    if not report["is_complete"]:
        lines.append("Unfinished: the same command goes on without paying twice; raise its caps where they ended it.")
    return lines
