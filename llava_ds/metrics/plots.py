"""Loss curves as pictures: the one import site of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_loss(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draws the loss over optimizer steps of every run into one PNG."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=120)
    for name, records in runs.items():
        steps = [record["step"] for record in records]
        axes.plot(steps, [record["loss"] for record in records], label=name, linewidth=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
