#!/usr/bin/env python3
"""Our merge beside DeepSpeed's conversion to safetensors: benchmarks/merge_ckpt.py [--quick | --sizes 1.0,2.0]."""

from __future__ import annotations

import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from machine import cpu_name
from merge_pair import NUM_RANKS, make_weights, open_tower, write_models, write_run, write_zero3
from merge_sides import memory_bytes

from llava_ds.checkpoint.keymap import HF_PROJECTOR, LLM, PROJECTOR, TOWER, projector_to_hf, strip_prefix, tower_to_clip
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.tensor_files import find_weight_files, open_tensors

SIZES = (0.05, 0.1, 0.3)
MEMORY_BAR_MB, WALL_BAR = 400, 1.0
FLAT_BAR_MB = 100  # more or fewer pieces wait between threads; not a tenth of what the weights grow by
MB = 1_000_000
SAMPLE_S = 0.002
SIDES = ("ours", "deepspeed")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="3 repeats at 0.05, 0.1 and 0.3: under two minutes.")
@click.option("--sizes", help="Billions of parameters, e.g. 1.0,2.0.  [default: 0.05,0.1,0.3]")
@click.option("--repeats", type=click.IntRange(1), help="Of every size.  [default: 7; with --quick or from 1.0 on 3]")
@click.option("--cold", is_flag=True, help="Reads the checkpoints from the disk; else they are in the page cache.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Of the temporary data.")
@click.option("--check", is_flag=True, help="Fails where any bar is not met: time, too, not memory and bytes alone.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
def main(
    quick: bool, sizes: str | None, repeats: int | None, cold: bool, folder: Path | None, check: bool,
    json_file: Path | None,
) -> None:
    """Merges the same weights of 4 ranks both ways, each in a process of its own, in turn, and compares every byte."""
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    billions = parse_sizes(sizes)
    figures: dict[str, Any] = describe(cold)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    rows = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="merge_ckpt-") as root:
        check_disk(Path(root), max(billions))
        click.echo(HEAD)
        for size in billions:
            row = measure_size(Path(root) / f"{size}", size, repeats or (3 if quick or size >= 1 else 7), cold)
            click.echo(format_row(row))
            rows.append(row)
    verdicts = judge(rows)
    figures["by_size"] = rows
    for name, value in (summarise(rows) | verdicts).items():
        figures[name] = value
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    # Time depends on what else runs here, memory does not.
    missed = [f"{name}: {v}" for name, v in verdicts.items() if "NOT" in v and (check or name != "bar_wall")]
    if missed:
        raise click.ClickException("; ".join(missed))


def parse_sizes(text: str | None) -> list[float]:
    """Billions, smallest first."""
    try:
        sizes = sorted(float(part) for part in text.split(",")) if text else list(SIZES)
    except ValueError as error:
        raise click.BadParameter(f"--sizes {text!r} is not of the form 0.1,1.0") from error
    if sizes[0] < 0.04:
        raise click.BadParameter(f"--sizes {text!r}: from 0.04 billion on; the vocabulary alone has 0.033")
    return sizes


def describe(cold: bool) -> dict[str, Any]:
    """What is measured, on what."""
    return {
        "measured": f"checkpoints of {NUM_RANKS} ranks (ZeRO-3, fp32, no optimizer states, which neither reads) to "
        "fp32 safetensors of 5 GB at most; each side in a process of its own, in turn; medians of wall time after "
        "imports; largest peak of RssAnon above that after imports, read every 2 ms; checkpoints "
        + ("read from the disk" if cold else "in the page cache"),
        "not_alike": "ours also checks every xxh128 of the checkpoint, writes tower, tokenizer and processor, brings "
        "all to the disk and reads it back from there; DeepSpeed returns when the page cache has it",
        "on": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, deepspeed "
        f"{version('deepspeed')}, safetensors {version('safetensors')}",
    }


def check_disk(folder: Path, billions: float) -> None:
    """Two checkpoints and two results must fit. Raises ClickException that says what is needed and found."""
    needed = 4 * 4 * billions * 1e9 * 1.05 + 1e9
    free = shutil.disk_usage(folder).free
    click.echo(f"disk: {needed / 1e9:.1f} GB needed at {billions} billion parameters, {free / 1e9:.1f} GB free")
    if free < needed:
        raise click.ClickException(
            f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room, or give "
            "another --folder or smaller --sizes"
        )


def measure_size(root: Path, size: float, repeats: int, cold: bool) -> dict[str, Any]:
    """Everything of one size; its data are removed at the end."""
    models = root / "models"
    write_models(models, int(size * 1e9))
    weights = make_weights(models)
    sources = {"ours": write_run(root / "run", models, weights), "deepspeed": root / "zero3"}
    write_zero3(sources["deepspeed"], weights, open_tower(models))
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in (*SIDES, "pieces")}
    try:
        for number in range(repeats):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                shutil.rmtree(root / f"{side}-out", ignore_errors=True)
                runs[side].append(run_side(side, sources[side], root / f"{side}-out", cold))
        num_equal = compare(root / "ours-out", root / "deepspeed-out")
        for side in SIDES:
            shutil.rmtree(root / f"{side}-out")
        runs["pieces"].append(run_side("pieces", sources["ours"], root / "pieces-out", cold))
    finally:
        shutil.rmtree(root)
    numel = sum(tensor.numel for tensor in weights.values())
    largest = max(tensor.num_bytes for tensor in weights.values())
    return gather(runs) | {
        "billions": size, "parameters": numel, "tensors_equal": num_equal, "largest_tensor_mb": round(largest / MB),
    }


def run_side(side: str, source: Path, out: Path, cold: bool) -> dict[str, float]:
    """Runs a side in a process of its own; seconds, and bytes of memory above those after its imports."""
    os.sync()  # or the disk is busy with what came before
    set_cache(source, cold)
    command = [sys.executable, str(Path(__file__).with_name("merge_sides.py")), side, str(source), str(out)]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ) as process:
        try:
            imported = json.loads(process.stdout.readline())["imported_anon_bytes"]
            process.stdin.write("go\n")
            process.stdin.flush()
            peak = sample_peak(process)
            figures = json.loads(process.stdout.readline())
        except (json.JSONDecodeError, BrokenPipeError) as error:  # it ended without an answer
            process.wait()
            log.seek(0)
            raise click.ClickException(f"{' '.join(command)} failed:\n{log.read()[-3000:]}") from error
        finally:
            process.kill()
    return figures | {"anon_bytes": peak - imported, "process_s": time.perf_counter() - begin}


def sample_peak(process: subprocess.Popen[str]) -> int:
    """The most anonymous memory of a process, until it says something or ends."""
    peak = 0
    while not select.select([process.stdout], [], [], SAMPLE_S)[0]:
        peak = max(peak, memory_bytes("RssAnon", process.pid))
    return peak


def set_cache(source: Path, cold: bool) -> None:
    """Brings a checkpoint into the page cache, or out of it."""
    buffer = bytearray(1 << 22)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        with file.open("rb", buffering=0) as handle:
            if cold:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and handle.readinto(buffer):
                pass


def compare(ours: Path, peer: Path) -> int:
    """How many tensors there are, all with the same bytes on both sides. Raises ClickException that names another.

    Ours are under transformers' names, and its vocabulary may have got rows for further words.
    """
    found = open_tensors(find_weight_files(ours))
    expected = under_our_export_names(open_tensors(find_weight_files(peer)))
    if found.keys() != expected.keys():
        raise click.ClickException(f"only one side has {sorted(found.keys() ^ expected.keys())[:9]}")
    different = [name for name, tensor in expected.items() if not same_bytes(found[name], tensor)]
    if different:
        raise click.ClickException(f"{len(different)} of {len(expected)} tensors differ, e.g. {different[:9]}")
    return len(expected)


def under_our_export_names(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """DeepSpeed's result has the names of our modules."""
    named = {f"vision_tower.vision_model.{k}": v for k, v in tower_to_clip(strip_prefix(weights, TOWER)).items()}
    named |= {HF_PROJECTOR + k: v for k, v in projector_to_hf(strip_prefix(weights, PROJECTOR), "mlp").items()}
    return named | {f"language_model.{k}": v for k, v in strip_prefix(weights, LLM).items()}


def same_bytes(found: LazyTensor, expected: LazyTensor) -> bool:
    """Whether two fp32 tensors are equal bit for bit, as far as the second one goes."""
    if found.shape[1:] != expected.shape[1:] or found.numel < expected.numel or found.dtype != expected.dtype:
        return False
    return all(
        torch.equal(one.view(torch.int32), other.view(torch.int32))
        for one, other in zip(found.rows(0, expected.shape[0]).pieces(), expected.pieces(), strict=True)
    )


def gather(runs: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The figures of one size from those of its runs: medians, ranges, and the largest peak of memory."""
    row: dict[str, Any] = {}
    for side in SIDES:
        for clock in ("wall_s", "cpu_s", "process_s", "on_disk_s"):
            row[f"{side}_{clock}"] = round(statistics.median(run[clock] for run in runs[side]), 3)
        row[f"{side}_wall_s_range"] = [round(pick(run["wall_s"] for run in runs[side]), 3) for pick in (min, max)]
        row[f"{side}_anon_mb"] = round(max(run["anon_bytes"] for run in runs[side]) / MB, 1)
        row[f"{side}_rss_mb"] = round(max(run["rss_grown_bytes"] for run in runs[side]) / MB, 1)
    for clock in ("wall_s", "cpu_s", "process_s"):
        ratios = [peer[clock] / own[clock] for own, peer in zip(runs["ours"], runs["deepspeed"], strict=True)]
        row[f"deepspeed_over_ours_{clock}"] = round(statistics.median(ratios), 2)
        row[f"deepspeed_over_ours_{clock}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    parts = ("check_input_s", "copy_s")
    return row | {part: round(run[part], 3) for run in runs["pieces"] for part in parts}


HEAD = (
    "billions | ours s (range)       | DeepSpeed s (range)  | DeepSpeed/ours | CPU s       | MB above imports | "
    "largest MB | check, copy s\n"
    "         |                      |                      | wall           | ours, DS    | ours, DS         | "
    "tensor     | ours, each by itself"
)


def format_row(row: Mapping[str, Any]) -> str:
    """A line of the table."""
    sides = [f"{row[f'{s}_wall_s']:.2f} ({'-'.join(f'{v:.2f}' for v in row[f'{s}_wall_s_range'])})" for s in SIDES]
    parts = ", ".join(f"{row[part]:.2f}" for part in ("check_input_s", "copy_s"))
    cpu = ", ".join(f"{row[f'{s}_cpu_s']:.2f}" for s in SIDES)
    memory = ", ".join(f"{row[f'{s}_anon_mb']:.0f}" for s in SIDES)
    return (
        f"{row['billions']:8} | {sides[0]:20} | {sides[1]:20} | {row['deepspeed_over_ours_wall_s']:14} | {cpu:11} | "
        f"{memory:16} | {row['largest_tensor_mb']:10} | {parts}"
    )


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A line a figure."""
    figures: dict[str, Any] = {}
    for row in rows:
        size = f"{row['billions']}b"
        figures[f"deepspeed_over_ours_wall_{size}"] = row["deepspeed_over_ours_wall_s"]
        figures[f"deepspeed_over_ours_cpu_{size}"] = row["deepspeed_over_ours_cpu_s"]
        figures[f"deepspeed_over_ours_with_imports_{size}"] = row["deepspeed_over_ours_process_s"]
        figures[f"ours_peak_anon_mb_{size}"] = row["ours_anon_mb"]
        figures[f"ours_kernels_peak_rss_mb_{size}"] = row["ours_rss_mb"]  # exact, with the pages of libraries
        figures[f"deepspeed_peak_anon_mb_{size}"] = row["deepspeed_anon_mb"]
        figures[f"bytes_equal_{size}"] = f"{row['tensors_equal']} tensors"
    for side in SIDES:
        figures[f"{side}_peak_growth_mb"] = growth(rows, side)
    return figures


def growth(rows: list[dict[str, Any]], side: str) -> float:
    """MB of peak that the largest size takes more than the smallest."""
    return round(rows[-1][f"{side}_anon_mb"] - rows[0][f"{side}_anon_mb"], 1)


def judge(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Each bar, by name: met or not, with the figure that decides."""
    beyond = max(row["ours_anon_mb"] - row["largest_tensor_mb"] for row in rows)
    grown = growth(rows, "ours")
    ratio = min(row["deepspeed_over_ours_wall_s"] for row in rows)
    return {
        "bar_memory": f"at most {beyond:.0f} MB beyond imports and the largest tensor, bar {MEMORY_BAR_MB}: "
        f"{met(beyond < MEMORY_BAR_MB)}",
        "bar_flat": f"{grown} MB more at {rows[-1]['billions']} than at {rows[0]['billions']} billion, bar "
        f"{FLAT_BAR_MB}: {met(grown <= FLAT_BAR_MB)}",
        "bar_wall": f"DeepSpeed takes at least {ratio} times as long, bar {WALL_BAR}: {met(ratio >= WALL_BAR)}",
    }


def met(holds: bool) -> str:
    """The word for it."""
    return "met" if holds else "NOT met"


if __name__ == "__main__":
    main()
