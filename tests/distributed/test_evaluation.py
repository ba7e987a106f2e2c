"""Evaluation during training: the numbers of a plain computation under every ZeRO stage, and training as without it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_ds.checkpoint.layout import step_dir
from llava_ds.checkpoint.load import load_model
from llava_ds.config import load_recipe
from llava_ds.data.images import ImageTransform
from llava_ds.data.sources.formats import open_source
from llava_ds.data.text_pipeline import TextPipeline
from tests.helpers.launch import read_lines, read_tensors, run_cases
from tests.helpers.teacher_forced import evaluate_reference
from tests.helpers.tiny import write_data, write_recipe, write_world

pytestmark = pytest.mark.slow

ZEROS = ("zero0", "zero1", "zero2", "zero3")
NUM_STEPS = 4
# fp32 sums in another order. Measured: 2e-7 between layouts, 3e-7 from the plain computation.
TOLERANCE = 1e-5
SAME_STEPS = {"train__warmup_ratio": 0.0, "train__adam_eps": 1e-3}  # see test_splits.py
KEEP_ALL = {"train__save_steps": 1, "train__keep_last": 9}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = write_world(tmp_path_factory.mktemp("evaluation"))
    write_data(root / "held", 7)
    (root / "held" / "one.json").write_text(json.dumps(json.loads((root / "held" / "train.json").read_text())[1:2]))
    _write_dropout(root)
    _write_broken(root)
    return root


def _write_dropout(root: Path) -> None:
    """An LLM whose training draws random numbers."""
    shutil.copytree(root / "llm", root / "llm-dropout")
    config = json.loads((root / "llm" / "config.json").read_text())
    (root / "llm-dropout" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))


def _write_broken(root: Path) -> None:
    """Held-out data with a picture that breaks off, which its header does not tell."""
    shutil.copytree(root / "held", root / "broken")
    whole = (root / "held" / "2.png").read_bytes()
    (root / "broken" / "2.png").write_bytes(whole[: len(whole) // 2])


def _case(world: Path, name: str, zero: str, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    recipe = write_recipe(world, **SAME_STEPS, **KEEP_ALL, **changes)
    return {"recipe": str(recipe), "zero": zero, "run_dir": str(world / name), "resume": resume}


def _held(world: Path, file: str = "held/train.json", steps: int = 2) -> dict[str, Any]:
    return {"eval__steps": steps, "eval__path": str(world / file)}


def _cases(world: Path, num_ranks: int) -> dict[str, dict[str, Any]]:
    """By the name of its run, after which ``-<ranks>`` follows."""
    packed, padded = {"data__packing": "packed"}, {"data__packing": "padded"}
    dropout = {"model__llm": str(world / "llm-dropout")}
    settings: dict[str, tuple[str, dict[str, Any]]] = {f"padded-{z}": (z, padded | _held(world)) for z in ZEROS}
    settings |= {f"packed-{z}": (z, packed | _held(world)) for z in ZEROS}
    settings |= {f"without-{z}": (z, padded) for z in ZEROS}
    settings |= {
        "one-sample": ("zero3", packed | _held(world, "held/one.json")),
        "budget": ("zero3", packed | _held(world) | {"train__micro_batch_tokens": 60, "train__micro_batch_size": 2}),
        "workers": ("zero3", packed | _held(world) | {"data__num_workers": 1}),
        "held-out": ("zero3", {"eval__steps": 3, "eval__holdout_samples": 3}),
        "dropout": ("zero3", dropout | _held(world, steps=1)),
        "without-dropout": ("zero3", dropout),
        "broken": ("zero3", _held(world, "broken/train.json")),
        "too-bad": ("zero3", _held(world, "broken/train.json") | {
            "data__on_bad_sample": "skip", "data__max_bad_frac": 0.0}),
        "skipping": ("zero3", _held(world, "broken/train.json") | {
            "data__on_bad_sample": "skip", "data__max_bad_frac": 0.5}),
    }
    return {name: _case(world, f"{name}-{num_ranks}", zero, **changes) for name, (zero, changes) in settings.items()}


@pytest.fixture(scope="module", params=[1, 2])
def runs(world, request) -> dict[str, Any]:
    """Number of ranks, outcomes of rank 0 by the name of the run, and of all ranks for the one that fails."""
    num_ranks = request.param
    cases = _cases(world, num_ranks)
    outcomes = run_cases(world, num_ranks, list(cases.values()))
    by_name = [dict(zip(cases, of_rank, strict=True)) for of_rank in outcomes]
    failed = {name: one["outcome"] for name, one in by_name[0].items() if one["outcome"] != "fine"}
    failed = {name: outcome for name, outcome in failed.items() if name not in ("broken", "too-bad")}
    assert not failed, failed
    return {"num_ranks": num_ranks, "by_rank": by_name, "world": world}


def _run_dir(runs: dict[str, Any], name: str) -> Path:
    return runs["world"] / f"{name}-{runs['num_ranks']}"


def _evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """The numbers of every evaluation, by step."""
    return {
        line["step"]: {key: value for key, value in line.items() if key.startswith("eval_")}
        for line in read_lines(run_dir)
        if "eval_loss" in line
    }


def _training(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the steps, without what was evaluated."""
    return [
        {key: value for key, value in line.items() if not key.startswith("eval_")}
        for line in read_lines(run_dir)
        if "loss" in line
    ]


def _expected(runs: dict[str, Any], name: str, step: int, without: tuple[str, ...] = ()) -> dict[str, float]:
    """What a plain computation finds with the weights of a checkpoint, in one process and one sample at a time."""
    run_dir = _run_dir(runs, name)
    record = json.loads((run_dir / "run.json").read_text())["config"]
    config = load_recipe(str(_recipe_file(runs, record)))
    loaded = load_model(step_dir(run_dir, step))
    spec = loaded.model.vision_tower.spec
    transform = ImageTransform.for_tower(spec, "square")
    text = TextPipeline(loaded.tokenizer, config.data.template, config.data.placement, spec.num_patches,
                        config.data.max_length, config.seed)
    source = open_source(config.eval.path, "auto", None, None, "QCM-LEA")
    samples = []
    for index in range(len(source)):
        encoded = text.encode(source[index], 0)
        if encoded.id not in without:
            pixels = [transform.levels(image) for image in encoded.images]
            samples.append((encoded, torch.stack(pixels) if pixels else torch.zeros(0)))
    return evaluate_reference(loaded.model, samples) | {"eval_bad_samples": len(without)}


def _recipe_file(runs: dict[str, Any], config: dict[str, Any]) -> Path:
    file = runs["world"] / "as-run.yaml"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    "name", [*(f"{packing}-{zero}" for packing in ("padded", "packed") for zero in ZEROS), "one-sample", "budget",
             "dropout"],
)
def test_the_numbers_are_those_of_a_plain_computation(runs, name):
    found = _evaluations(_run_dir(runs, name))
    assert list(found) == ([0, 1, 2, 3, 4] if name == "dropout" else [0, 2, 4])
    for step in (0, NUM_STEPS):
        assert found[step] == pytest.approx(_expected(runs, name, step), abs=TOLERANCE), step
    assert abs(found[0]["eval_loss"] - found[4]["eval_loss"]) > 100 * TOLERANCE
    assert found[0]["eval_num_samples"] == (1 if name == "one-sample" else 7)


def test_the_numbers_do_not_depend_on_the_layout(runs):
    reference = _evaluations(_run_dir(runs, "padded-zero0"))
    names = [f"{packing}-{zero}" for packing in ("padded", "packed") for zero in ZEROS] + ["budget", "workers"]
    for name in names:
        found = _evaluations(_run_dir(runs, name))
        assert found.keys() == reference.keys() == {0, 2, 4}
        for step, numbers in reference.items():
            assert found[step] == pytest.approx(numbers, abs=TOLERANCE), (name, step)


@pytest.mark.parametrize(("name", "without"), [*((f"padded-{z}", f"without-{z}") for z in ZEROS),
                                               ("dropout", "without-dropout")])
def test_training_is_the_same_bit_for_bit(runs, name, without):
    lines = _training(_run_dir(runs, name))
    assert len(lines) == NUM_STEPS and lines == _training(_run_dir(runs, without))
    tensors, expected = (read_tensors(step_dir(_run_dir(runs, one), NUM_STEPS)) for one in (name, without))
    assert tensors.keys() == expected.keys() and len(tensors) > 20
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_samples_that_are_held_out_are_evaluated_at_the_end_too(runs):
    assert list(_evaluations(_run_dir(runs, "held-out"))) == [0, 3, 4]
    record = json.loads((_run_dir(runs, "held-out") / "run.json").read_text())
    assert (record["num_samples"], record["eval"]["num_samples"], record["eval"]["data"]) == (8, 3, None)
    assert (_run_dir(runs, "held-out") / "loss.png").stat().st_size > 1000
    assert "evaluation after step 3: loss" in runs["by_rank"][0]["held-out"]["output"]


def test_a_picture_that_breaks_off_ends_all_ranks_or_is_left_out_and_counted(runs):
    for of_rank in runs["by_rank"]:
        assert "train.json[2] id='s2'" in of_rank["broken"]["outcome"]
        assert "does not decode" in of_rank["broken"]["outcome"]
        assert "1 of 7 held-out samples had a picture" in of_rank["too-bad"]["outcome"]
    found = _evaluations(_run_dir(runs, "skipping"))
    assert list(found) == [0, 2, 4]
    for step in (0, NUM_STEPS):
        assert found[step] == pytest.approx(_expected(runs, "skipping", step, without=("s2",)), abs=TOLERANCE)
    assert _training(_run_dir(runs, "skipping"))[-1]["bad_samples"] == 0


def test_a_resumed_run_repeats_and_loses_no_line(world):
    """Resumed before, right after and between evaluations, under ZeRO-3 with random numbers in the model."""
    changes = {"model__llm": str(world / "llm-dropout"), **_held(world)}
    whole = _case(world, "whole", "zero3", **changes)
    run_cases(world, 2, [whole])
    steps = (0, 2, 3)
    for step in steps:
        shutil.copytree(world / "whole", world / f"resumed-{step}")
    outcomes = run_cases(
        world, 2, [_case(world, f"resumed-{step}", "zero3", resume=str(step), **changes) for step in steps]
    )
    lines = read_lines(world / "whole")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for step, outcome in zip(steps, outcomes[0], strict=True):
        assert outcome["outcome"] == "fine", outcome
        assert f"step {step} of 4 is done" in outcome["output"]
        assert read_lines(world / f"resumed-{step}") == lines


def test_another_evaluation_set_is_no_way_to_go_on(world):
    first = _case(world, "moved", "zero1", **_held(world))
    shutil.copytree(world / "held", world / "elsewhere")
    again = _case(world, "moved", "zero1", resume="2", **_held(world, "elsewhere/train.json"))
    other = _case(world, "moved", "zero1", resume="2", **_held(world, "held/one.json"))
    outcomes = run_cases(world, 1, [first, again, other])[0]
    assert [one["outcome"] for one in outcomes[:2]] == ["fine", "fine"]
    assert "one.json: xxh128" in outcomes[2]["outcome"] and "1 problem(s)" in outcomes[2]["outcome"]
