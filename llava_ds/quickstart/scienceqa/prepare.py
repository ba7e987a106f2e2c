"""A data set in ScienceQA's exact layout about the quickstart's concepts, since ScienceQA itself is in no package.

Like the quickstart's other data it is built once, and cached by a hash of what it depends on.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_ds.cache import build_once, cache_folder
from llava_ds.quickstart.concepts import Concept, load_concepts
from llava_ds.quickstart.prepare import Log, read_sources
from llava_ds.quickstart.prepare import prepare as prepare_quickstart
from llava_ds.quickstart.scienceqa.problems import KINDS, Draw, Problem

NUM_PROBLEMS = {"train": 4200, "val": 210, "test": 630}
NUM_MINI = 70


def prepare(log: Log = print) -> Path:
    """The folder of the problems and of the models that learn from them, built first where it is not there.

    It holds ``scienceqa/`` (``problems.json``, ``pid_splits.json``, ``images/SPLIT/PID/image.png``), links to the
    quickstart's ``tower`` and ``llm``, ``sources.json`` and, written last, ``COMPLETE``. Pictures of the test split are
    in the style that nothing was trained on.

    Raises ConfigError when a package is missing.
    """
    quickstart = prepare_quickstart(log)
    target = cache_folder() / f"quickstart_scienceqa-{_content_hash(quickstart.name)}"
    build_once(target, lambda work: _fill(work, quickstart, log))
    return target


def _content_hash(quickstart: str) -> str:
    digest = hashlib.sha256(quickstart.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _fill(work: Path, quickstart: Path, log: Log) -> None:
    log(f"quickstart: building ScienceQA-like problems in {work.parent}")
    for name in ("tower", "llm", "sources.json"):
        (work / name).symlink_to(Path("..") / quickstart.name / name)
    write_scienceqa(work / "scienceqa", quickstart)


def write_scienceqa(folder: Path, quickstart: Path, num_problems: Mapping[str, int] = NUM_PROBLEMS) -> None:
    """Writes the problems, a pure function of the quickstart's folder, which has the pictures.

    Those of the test split are in the unseen style.
    """
    sources = read_sources(quickstart)
    pictures = {
        split: _find_pictures(quickstart / "images", [sources["unseen"]] if split == "test" else sources["trained"])
        for split in num_problems
    }
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for split, number in num_problems.items():
        splits[split] = [str(len(problems) + n + 1) for n in range(number)]
        for pid in splits[split]:
            rng = random.Random(f"scienceqa|{pid}")
            problem = KINDS[int(pid) % len(KINDS)](rng, list(pictures[split]), _drawer(pictures[split], rng))
            problems[pid] = _record(problem, split, f"grade{rng.randint(1, 12)}")
            if problem.picture is not None:
                place = folder / "images" / split / pid
                place.mkdir(parents=True)
                problem.picture.save(place / "image.png")
    splits["trainval"] = splits["train"] + splits["val"]
    splits |= {f"mini{split}": splits[split][:NUM_MINI] for split in num_problems}
    for name, value in (("problems", problems), ("pid_splits", splits)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")


def _find_pictures(images: Path, styles: Sequence[str]) -> dict[Concept, list[Path]]:
    """Every picture of the concepts that were drawn in one of ``styles``."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(images.glob("*.png")):
        found[re.sub("-[a-z]+$", "", file.stem)].append(file)  # without the name of the view
    pictures = {
        concept: [file for style in styles for file in found[f"{style}-{concept.code_points.lower()}"]]
        for concept in load_concepts()
    }
    return {concept: files for concept, files in pictures.items() if files}


def _drawer(pictures: Mapping[Concept, Sequence[Path]], rng: random.Random) -> Draw:
    return lambda concept: Image.open(rng.choice(pictures[concept]))


def _record(problem: Problem, split: str, grade: str) -> dict[str, Any]:
    """A problem with the fields of ``problems.json``, in their order there."""
    return {
        "question": problem.question,
        "choices": list(problem.choices),
        "answer": problem.answer,
        "hint": problem.hint,
        "image": None if problem.picture is None else "image.png",
        "task": "closed choice",
        "grade": grade,
        "subject": problem.subject,
        "topic": problem.topic,
        "category": problem.category,
        "skill": problem.skill,
        "lecture": problem.lecture,
        "solution": problem.solution,
        "split": split,
    }
