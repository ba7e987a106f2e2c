#!/usr/bin/env python3
"""Opening a JSONL file for the first and the second time, and reading it: benchmarks/jsonl_index.py [--quick]."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import cpu_name

BYTES_PER_RECORD = 300  # at most
NUM_READS = 100_000

# Each runs in a process of its own. ``measure`` gives seconds and the memory above the imports.
COMMON = """
import json, os, random, sys, time
path, num_reads = sys.argv[1], int(sys.argv[2])

def memory(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))

def measure(work):
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again
    anonymous, resident = memory("RssAnon"), memory("VmRSS")
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    figures.update(seconds=seconds, anonymous_mb=memory("RssAnon") - anonymous, peak_mb=memory("VmHWM") - resident)
    return result

def read_some(rows, read):
    order = random.Random(0).sample(range(len(rows)), num_reads)
    begin = time.perf_counter()
    for index in order:
        read(rows, index)
    figures.update(reads_per_s=num_reads / (time.perf_counter() - begin))

figures = {}
"""
OURS = """
from pathlib import Path
from llava_ds.data.sources.jsonl import open_jsonl, parse_line

def open_and_read_one():
    file = open_jsonl(Path(path), log=lambda _: None)
    assert parse_line(file[-1], file.where(-1))["id"]
    return file

file = measure(open_and_read_one)
read_some(file, lambda rows, index: parse_line(rows[index], ""))
"""
DATASETS = """
import datasets
datasets.disable_progress_bars()

def open_and_read_one():
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=path + ".datasets")
    assert rows[len(rows) - 1]["id"]
    return rows

rows = measure(open_and_read_one)
read_some(rows, lambda rows, index: rows[index])
"""
PLAIN = """
def load():
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]

rows = measure(load)
read_some(rows, lambda rows, index: rows[index])
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="About 300 MB: under a minute. The full run takes 10 million records.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Where the file is made.")
def main(quick: bool, json_file: Path | None, folder: Path | None) -> None:
    """Makes a JSONL file, opens and reads it, beside ``datasets`` where it is installed, else a plain load."""
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    num_records = 1_300_000 if quick else 10_000_000
    needed, free = 3 * num_records * BYTES_PER_RECORD, shutil.disk_usage(folder or tempfile.gettempdir()).free
    if free < needed:
        raise click.ClickException(
            f"{needed / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free; use --folder or --quick"
        )
    if not has_datasets() and 2 * num_records * 1024 > (available := available_bytes()):
        raise click.ClickException(
            f"the peer json.loads needs {2 * num_records / 1e6:.0f} GB of memory, {available / 1e9:.0f} are free; "
            "install datasets for another peer, or use --quick"
        )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        figures = measure(Path(work) / "train.jsonl", num_records)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def measure(path: Path, num_records: int) -> dict[str, Any]:
    """The figures by name, each with its unit in the name or in the text."""
    write_records(path, num_records)
    size_mb = path.stat().st_size / 1e6
    forget(path)
    cold = run(OURS, path)
    path.with_name("train.jsonl.index").unlink()
    first, second = run(OURS, path), run(OURS, path)
    peer_name, script = ("datasets", DATASETS) if has_datasets() else ("json.loads", PLAIN)
    peer_first = run(script, path)
    peer_second = run(script, path)
    return {
        "measured": f"open and read the last record, then {NUM_READS} random records with their JSON; {num_records} "
        f"records, {size_mb:.0f} MB; every open in a fresh process, memory above the imports; file in the page cache, "
        f"but for the cold open; peer: {peer_name}",
        "on": f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}",
        "first_open_mb_per_s": round(size_mb / first["seconds"]),
        "first_open_cold_mb_per_s": round(size_mb / cold["seconds"]),
        **named("first_open", first),
        **named("second_open", second),
        "random_reads_per_s": round(second["reads_per_s"]),
        **named(f"{peer_name}_first_open", peer_first),
        **named(f"{peer_name}_second_open", peer_second),
        f"{peer_name}_random_reads_per_s": round(peer_second["reads_per_s"]),
        "first_open_times_faster": round(peer_first["seconds"] / first["seconds"], 1),
        "second_open_times_faster": round(peer_second["seconds"] / second["seconds"], 1),
        "random_reads_times_faster": round(second["reads_per_s"] / peer_second["reads_per_s"], 1),
    }


def named(name: str, figures: dict[str, float]) -> dict[str, float]:
    """Seconds and memory of one open under its name."""
    return {
        f"{name}_s": round(figures["seconds"], 4),
        f"{name}_anonymous_mb": round(figures["anonymous_mb"], 1),
        f"{name}_peak_mb": round(figures["peak_mb"], 1),
    }


def write_records(path: Path, num_records: int) -> None:
    """Records of 150 to 300 bytes, as conversations of LLaVA are."""
    lengths = np.random.default_rng(0).integers(0, 140, num_records).tolist()
    words = "a photo of two cats that sleep on a red sofa beside a window, while it rains on the street outside. " * 2
    with path.open("w", encoding="utf-8", buffering=1 << 22) as file:
        for number, length in enumerate(lengths):
            file.write(
                f'{{"id": "{number:09}", "image": "{number:09}.jpg", "conversations": [{{"from": "human", "value": '
                f'"<image>\\nWhat is it?"}}, {{"from": "gpt", "value": "{words[:length]}"}}]}}\n'
            )
        file.flush()
        os.fsync(file.fileno())


def has_datasets() -> bool:
    """Whether the package ``datasets`` is installed."""
    return importlib.util.find_spec("datasets") is not None


def available_bytes() -> int:
    """Memory that is free or can be freed."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(script: str, path: Path) -> dict[str, float]:
    """The figures of a script in a fresh process."""
    command = [sys.executable, "-c", COMMON + script + "\nprint(json.dumps(figures))", str(path), str(NUM_READS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise click.ClickException(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
