"""A small LLaVA-Bench in the official layouts, and the shared COCO questions where they are given."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest

CATEGORIES = ("conv", "detail", "complex")
Files = dict[str, Path]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSONL, again."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_bench(
    folder: Path,
    num_questions: int = 6,
    kind: Literal["coco", "in_the_wild"] = "coco",
    models: tuple[str, ...] = ("ours",),
) -> Files:
    """Files by option name, answers by model; three questions an image."""
    ids = range(num_questions)
    category = [CATEGORIES[id % 3] for id in ids]
    if kind == "coco":
        contexts = [
            {"id": f"{image}", "image": f"{image}.jpg", "captions": [f"A dog {image}.", "A dog."],
             "instances": [{"category": "dog", "bbox": [0.1, 0.25, 0.5, 1.0]},
                           {"category": "cat", "bbox": [0, 0, 1, 1]}]}
            for image in range((num_questions + 2) // 3 + 1)  # one that no question is about
        ]
    else:
        contexts = [{"id": f"{image}", "image": f"{image}.jpg", "caption": f"A dog {image}, at length."}
                    for image in range((num_questions + 2) // 3)]
    questions = [{"question_id": id, "image": f"{id // 3}.jpg", "text": f"What is it? ({id})", "category": category[id]}
                 for id in ids]
    references = [{"question_id": id, "text": f"A dog, number {id}.", "category": category[id]} for id in ids]
    files = {
        "questions": write_rows(folder / "questions.jsonl", questions),
        "references": write_rows(folder / "references.jsonl", references),
        "context": write_rows(folder / "context.jsonl", contexts),
    }
    for model in models:
        files[model] = write_answers(folder / "answers" / f"{model}.jsonl", questions, model)
    return files


def write_answers(path: Path, questions: Iterable[dict[str, Any]], model: str) -> Path:
    """As tools/evaluate writes answers."""
    return write_rows(
        path,
        ({"question_id": row["question_id"], "prompt": row["text"], "text": f"{model} says {row['question_id']}",
          "category": row["category"], "model": model} for row in questions),
    )


def shuffle(path: Path, seed: int = 0) -> None:
    """The lines of a file in another order."""
    lines = path.read_text().splitlines(keepends=True)
    Random(seed).shuffle(lines)
    path.write_text("".join(lines))


def shared_coco() -> Files:
    """The 90 official questions with references and contexts; the test is skipped where they are not given."""
    folder = os.environ.get("LLAVA_DS_BENCH_COCO")
    if not folder:
        pytest.skip("LLAVA_DS_BENCH_COCO names no folder with the 90 questions of LLaVA-Bench (COCO)")
    names = {"questions": "qa90_questions", "references": "qa90_gpt4_answer", "context": "caps_boxes_coco2014_val_80"}
    return {option: Path(folder) / f"{name}.jsonl" for option, name in names.items()}
