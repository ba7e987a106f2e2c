#!/usr/bin/env python3
"""What must hold at 1,024 ranks, without a network, beside 8 ranks: benchmarks/thousand_ranks.py [--quick]."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported

import click  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from machine import cpu_name  # noqa: E402
from scale_checkpoint import NUM_WRITERS, build_model, measure_checkpoint  # noqa: E402
from scale_child import CheckFailedError, Figures, check, measure_in_child  # noqa: E402
from scale_cluster import MAX_OPEN_FILES, measure_logs, measure_preflight, measure_watchdog, write_logs  # noqa: E402
from scale_data import NUM_STEPS, SAMPLES_PER_RANK, draw_table, measure_data  # noqa: E402

FEW_RANKS = 8


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Fewer samples, parameters and lines: under 40 s.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
@click.option("--ranks", type=click.IntRange(16), default=1024, show_default=True, help="Beside 8 ranks.")
@click.option("--lengths", type=click.Path(exists=True, path_type=Path, dir_okay=False),
              help="An .npz with text_tokens and num_images. [default: drawn, like the 665k mix]")  # fmt: skip
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to write [default: temporary].")
def main(quick: bool, json_file: Path | None, ranks: int, lengths: Path | None, folder: Path | None) -> None:
    """Checks the data order, a checkpoint, preflight, logs and the watchdog, and ends with 1 where one is wrong.

    Times and memory are printed; how large they may be is not checked.
    """
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            sides = measure_sides(ranks, quick, lengths, Path(root))
    except CheckFailedError as error:
        sys.exit(f"thousand_ranks: {error}")
    num_samples, num_layers, num_lines = sizes(quick)
    figures: dict[str, Any] = {
        "measured": f"{ranks} ranks beside {FEW_RANKS}: a plan of {num_samples} samples, {SAMPLES_PER_RANK} a rank and "
        f"step at {ranks} ranks, {NUM_STEPS} steps; a checkpoint of {len(build_model(num_layers))} tensors; as many "
        f"nodes as ranks in the preflight; {num_lines} lines a log, {MAX_OPEN_FILES} open files; {NUM_WRITERS} ranks "
        "write at a time; beats over loopback; times by the clock, or of the CPU (cpu); peak: of RssAnon above the "
        "start of a part",
        "on": f"{cpu_name()}, {os.cpu_count()} CPUs, one thread, torch {torch.__version__}, numpy {np.__version__}",
    }
    for name, many in sides[ranks].items():
        few = sides[FEW_RANKS][name]
        figures[name] = {f"{ranks}_ranks": _rounded(many), f"{FEW_RANKS}_ranks": _rounded(few)}
        if few:
            figures[name]["ratio"] = _rounded(many / few)
    for name, value in figures.items():
        shown = ", ".join(f"{key} {one:g}" for key, one in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name}: {shown}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def sizes(quick: bool) -> tuple[int, int, int]:
    """Samples, layers and lines a log."""
    return (50_000, 4, 60) if quick else (665_000, 32, 300)


def measure_sides(ranks: int, quick: bool, lengths: Path | None, root: Path) -> dict[int, Figures]:
    """The figures of both numbers of ranks. Raises CheckFailedError when something does not hold."""
    num_samples, num_layers, num_lines = sizes(quick)
    table, model = draw_table(num_samples, lengths), build_model(num_layers)
    sides: dict[int, Figures] = {}
    orders = {}
    for side in (FEW_RANKS, ranks):
        figures, orders[side] = _data_in_child(partial(measure_data, table, side, SAMPLES_PER_RANK * ranks))
        figures |= measure_in_child(
            "checkpoint", partial(measure_checkpoint, model, side, root / f"step-{side:08d}")
        )
        figures |= measure_in_child("preflight", partial(measure_preflight, side))
        write_logs(root / f"logs-{side}", side, num_lines)
        figures |= measure_in_child("logs", partial(measure_logs, root / f"logs-{side}", side, num_lines))
        figures |= measure_in_child("watchdog", partial(measure_watchdog, side))
        sides[side] = figures
    check(orders[ranks] == orders[FEW_RANKS], f"{ranks} ranks have other global batches than {FEW_RANKS}")
    return sides


def _data_in_child(work: Callable[[], tuple[Figures, list[str]]]) -> tuple[Figures, list[str]]:
    """The figures, and the order, which the child hands over beside them."""
    with tempfile.TemporaryFile("w+") as file:

        def run() -> Figures:
            figures, digests = work()
            json.dump(digests, file)
            file.flush()
            return figures

        figures = measure_in_child("data", run)
        file.seek(0)
        return figures, json.load(file)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
