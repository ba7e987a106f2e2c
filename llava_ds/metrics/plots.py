"""Figures as pictures: the one import site of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_loss(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws the loss over optimizer steps of every run into one PNG, and where it was evaluated that as points."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=120)
    for name, records in runs.items():
        (line,) = axes.plot(*_curve(records, "loss"), label=name, linewidth=1)
        steps, losses = _curve(records, "eval_loss")
        if steps:
            axes.plot(steps, losses, "o--", color=line.get_color(), markersize=4, linewidth=1, alpha=0.7,
                      label=f"{name}, held out")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _curve(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    known = [record for record in records if record.get(key) is not None]
    return [record["step"] for record in known], [record[key] for record in known]


def plot_lengths(report: Mapping[str, Any], path: Path) -> None:
    """Draws the lengths of samples and the expected waste of a report of tools/doctor into one PNG."""
    lengths, waste = report["lengths"], report["waste"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), dpi=120, width_ratios=(2.4, 1))
    _draw_lengths(left, lengths, report["settings"]["max_length"])
    _draw_waste(right, waste)
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def _draw_lengths(axes: Any, lengths: Mapping[str, Any], max_length: int) -> None:
    histogram = lengths["histogram"]
    axes.stairs(histogram["tokens"], histogram["edges"], fill=True, color="tab:blue", alpha=0.5, label="all tokens")
    axes.stairs(
        histogram["supervised"], histogram["edges"], color="tab:orange", linewidth=1.5, label="supervised tokens"
    )
    axes.axvline(max_length, color="tab:red", linestyle="--", linewidth=1, label=f"limit ({max_length})")
    axes.set_yscale("log")
    tallest = max(*histogram["tokens"], *histogram["supervised"])
    axes.set_ylim(0.7, 5 * tallest)  # room for the legend
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens of a sample, images counted")
    axes.set_ylabel("samples (log scale)")
    share = lengths["supervised_frac"]
    axes.set_title(f"Sample lengths; {share:.1%} of all tokens are supervised", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="upper left")


def _draw_waste(axes: Any, waste: Mapping[str, Any]) -> None:
    names = ("packed", f"padded, sorted\n(length_groups={waste['length_groups']})", "padded")
    values = [100 * waste[key] for key in ("packed", "padded_by_length", "padded")]
    bars = axes.barh(names, values, height=0.6, color=["tab:green", "tab:olive", "tab:gray"])
    axes.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, *values) * 1.45)
    axes.set_xlabel("% of computed positions")
    axes.set_title(
        f"Expected waste: {waste['world_size']} ranks,\n{waste['global_batch_size']} samples a step", fontsize=10
    )
    axes.grid(axis="x", alpha=0.3)
