#!/usr/bin/env python3
"""From records to collated batches, and the lengths of a data set: benchmarks/data_path.py [--quick]."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from images import IMAGE_SIZE, MEAN, STD, expanded_to_square, official_reference, write_pictures
from machine import cpu_name
from PIL import Image
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llava_ds.data.collator import Collator
from llava_ds.data.dataset import LlavaDataset
from llava_ds.data.images import ImageTransform
from llava_ds.data.lengths import measure_source
from llava_ds.data.sampler import Slot
from llava_ds.data.sources.llava_json import open_llava_jsonl
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.models.build import load_tokenizer
from llava_ds.ops.normalise import normalise_levels
from llava_ds.schema import Batch

NUM_PATCHES, MAX_LENGTH, BATCH_SIZE = 576, 2048, 16
IGNORE, IMAGE = -100, -200
WORDS = (
    "the a dog cat red sofa with near people walking along street yellow bus sign building sky appears standing "
    "holding umbrella image describes scene several background where what colour there wooden table behind"
).split()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Few records and repeats.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there.")
def main(quick: bool, json_file: Path | None) -> None:
    """Times ours and a plain path written from the official code's description, in CPU seconds of one thread."""
    if json_file and not json_file.parent.is_dir():
        raise click.BadParameter(f"{json_file}: there is no folder {json_file.parent}; create it first")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLAVA_DS_CACHE"] = str(Path(folder) / "cache")
        tokenizer = load_tokenizer(str(write_tokenizer(Path(folder) / "llm")))
        figures = measure_path(Path(folder), tokenizer, *((64, 5) if quick else (256, 9)))
        figures |= measure_lengths(Path(folder), tokenizer, 8_000 if quick else 100_000)
    for name, value in figures.items():
        click.echo(f"{name}: {value}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def measure_path(folder: Path, tokenizer: Any, num_records: int, num_repeats: int) -> dict[str, Any]:
    """Samples per CPU second of both ways, taken in turn."""
    pictures = [file.name for file in write_pictures(folder, min(num_records, 32), 90)]
    source = open_llava_jsonl(write_records(folder / "path.jsonl", num_records, pictures), folder)
    text = TextPipeline(tokenizer, "v1", "front", NUM_PATCHES, MAX_LENGTH, 0)
    blank = torch.zeros((3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    data = LlavaDataset(source, text, ImageTransform(IMAGE_SIZE, MEAN, STD, "pad", "bicubic").levels, blank)
    collator = Collator("padded", blank, False)
    lines = (folder / "path.jsonl").read_bytes().splitlines()
    slow = slow_tokenizer(folder / "llm" / "tokenizer.model")

    def ours(numbers: Sequence[int]) -> Batch:
        return collator([data[Slot(0, number)] for number in numbers])

    def normalised(numbers: Sequence[int]) -> torch.Tensor:
        return normalise_levels(ours(numbers).pixel_values, MEAN, STD)  # in training the tower does, on its device

    def official(numbers: Sequence[int]) -> torch.Tensor:
        return official_batch([json.loads(lines[number]) for number in numbers], folder, slow)

    ways: dict[str, Callable[[Sequence[int]], Any]] = {"ours": ours, "normalised": normalised, "official": official}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_repeats):
        for name, way in ways.items():
            seconds[name].append(cpu_seconds(way, num_records))
    ratios = {
        name: [peer / own for peer, own in zip(seconds["official"], seconds[name], strict=True)]
        for name in ("ours", "normalised")
    }
    per_s = {name: num_records / statistics.median(spent) for name, spent in seconds.items()}
    return {
        "measured": f"record to collated batch of {BATCH_SIZE}, a JPEG of 640x480 at {IMAGE_SIZE} px each and "
        f"conversations of 1 to 4 rounds, {num_records} samples, median of {num_repeats} rounds taken in turn",
        "on": f"{cpu_name()}, 1 thread, torch {torch.__version__}, transformers {transformers.__version__}",
        "samples_per_cpu_s": round(per_s["ours"], 1),
        "official_reference_samples_per_cpu_s": round(per_s["official"], 1),
        "ours_over_official_reference": round(statistics.median(ratios["ours"]), 2),
        "ours_over_official_reference_range": [round(min(ratios["ours"]), 2), round(max(ratios["ours"]), 2)],
        "samples_per_cpu_s_normalised_on_the_cpu_too": round(per_s["normalised"], 1),
        "normalised_on_the_cpu_too_over_official_reference": round(statistics.median(ratios["normalised"]), 2),
    }


def measure_lengths(folder: Path, tokenizer: Any, num_records: int) -> dict[str, Any]:
    """Exact lengths of a JSONL with 1 process and with one a core, and found again."""
    source = open_llava_jsonl(write_records(folder / "lengths.jsonl", num_records, []), folder)
    num_cores = len(os.sched_getaffinity(0))
    seconds: dict[int, float] = {}
    for num_processes in sorted({1, num_cores}):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        # Random placement: text-only records, so each is encoded once here as there.
        text = TextPipeline(tokenizer, "v1", "random", NUM_PATCHES, MAX_LENGTH, 0)
        begin = time.perf_counter()
        lengths = measure_source(source, text, "error", num_processes, log=lambda _: None)
        seconds[num_processes] = time.perf_counter() - begin
    begin = time.perf_counter()
    again = measure_source(source, text, "error", log=lambda _: None)
    again_s = time.perf_counter() - begin
    sample = range(0, num_records, max(1, num_records // 500))
    begin = time.process_time()
    slow = slow_tokenizer(folder / "llm" / "tokenizer.model")
    counted = [len(official_ids(source[i].turns, slow)[0]) for i in sample]
    official_per_s = len(counted) / (time.process_time() - begin)
    if counted != lengths.rows["num_tokens"][sample, 0].tolist() or not (again.rows == lengths.rows).all():
        raise SystemExit("the two ways do not count the same tokens")
    one = num_records / seconds[1]
    return {
        "lengths_records": num_records,
        "lengths_records_per_s_1_process": round(one),
        f"lengths_records_per_s_{num_cores}_processes": round(num_records / seconds[num_cores]),
        "lengths_found_again_s": round(again_s, 4),
        "lengths_1_process_over_official_reference": round(one / official_per_s, 2),
    }


def official_batch(records: Sequence[dict[str, Any]], folder: Path, tokenizer: SlowTokenizer) -> torch.Tensor:
    """Image first, ids turn by turn, PIL pictures, rows padded to the longest."""
    encoded, pictures = [], []
    for record in records:
        picture = Image.open(folder / record["image"]).convert("RGB")
        pictures.append(official_reference(expanded_to_square(picture)))
        turns = record["conversations"]
        question = turns[0]["value"].replace("<image>", "").strip()
        texts = ["<image>\n" + question, *(turn["value"] for turn in turns[1:])]
        encoded.append(official_ids(texts, tokenizer))
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.zeros((len(encoded), longest), dtype=torch.long)
    labels = torch.full((len(encoded), longest), IGNORE)
    for row, (row_ids, row_labels) in enumerate(encoded):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    torch.stack(pictures)
    return ids


class SlowTokenizer(SentencePieceBackend):
    """transformers' Python tokenizer over SentencePiece, as the official code's ``use_fast=False``."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}


def slow_tokenizer(file: Path) -> SlowTokenizer:
    """That of a LLaMA model."""
    return SlowTokenizer(vocab_file=str(file), unk_token="<unk>", bos_token="<s>", eos_token="</s>", legacy=False)


def official_ids(turns: Sequence[Any], tokenizer: SlowTokenizer) -> tuple[list[int], list[int]]:
    """The v1 template: the whole text in chunks between images, then every round again to find where its answer is."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    texts = [turn if isinstance(turn, str) else turn.text for turn in turns]
    rounds = [f"USER: {q} ASSISTANT: {a}</s>" for q, a in zip(texts[::2], texts[1::2], strict=True)]

    def tokenize(text: str) -> list[int]:
        ids = [1]
        for number, chunk in enumerate(text.split("<image>")):
            ids += ([IMAGE] if number else []) + tokenizer(chunk, add_special_tokens=False).input_ids
        return ids

    ids = tokenize(system + "".join(rounds))
    labels = list(ids)
    position = 1
    labels[0] = IGNORE
    for number, text in enumerate(rounds):
        text = (system if number == 0 else "") + text.removesuffix("</s>")
        length, before = len(tokenize(text)), len(tokenize(text.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 2
        labels[position : position + before] = [IGNORE] * before
        position += length
    return ids, labels


def cpu_seconds(way: Callable[[Sequence[int]], Any], num_records: int) -> float:
    """CPU seconds of this process for all records, a batch at a time."""
    begin = time.process_time()
    for start in range(0, num_records, BATCH_SIZE):
        way(range(start, min(num_records, start + BATCH_SIZE)))
    return time.process_time() - begin


def write_records(file: Path, num_records: int, pictures: Sequence[str]) -> Path:
    """LLaVA JSONL of 1 to 4 rounds, answers of 5 to 80 words; with pictures, each record has one."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most))).capitalize() + "."

    with file.open("w") as out:
        for number in range(num_records):
            turns = []
            for _ in range(draw.choice([1, 1, 2, 3, 4])):
                turns += [{"from": "human", "value": words(5, 15)}, {"from": "gpt", "value": words(5, 80)}]
            record: dict[str, Any] = {"id": str(number), "conversations": turns}
            if pictures:
                record["image"] = pictures[number % len(pictures)]
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            out.write(json.dumps(record) + "\n")
    return file


def write_tokenizer(folder: Path) -> Path:
    """A published LLaMA-like tokenizer of 32,000 pieces: that of the package mistral-common (extra dev)."""
    package = util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        raise click.ClickException('the package mistral-common has the tokenizer: pip install -e ".[dev]"')
    folder.mkdir()
    shutil.copyfile(
        Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1", folder / "tokenizer.model"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


if __name__ == "__main__":
    main()
