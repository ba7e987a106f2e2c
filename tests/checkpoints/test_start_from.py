"""Stage 2 starts from stage 1 in whatever layout that is: the same weights give the same losses."""

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_ds.checkpoint.convert import convert
from llava_ds.checkpoint.layout import read_run, step_dir
from llava_ds.checkpoint.merge import merge
from tests.helpers.launch import read_lines, read_tensors, run_cases
from tests.helpers.tiny import write_recipe, write_world

pytestmark = pytest.mark.slow

STEPS = {"train__max_steps": 2, "train__warmup_ratio": 0.0}


def _case(root: Path, name: str, **changes) -> dict:
    return {"recipe": str(write_recipe(root, **STEPS, **changes)), "zero": "zero3", "run_dir": str(root / name)}


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_every_layout_of_stage_1_starts_the_same_stage_2(tmp_path, projector):
    root = write_world(tmp_path)
    first = _case(root, "stage1", train__trainable=["projector"], model__projector=projector)
    assert [rank[0]["outcome"] for rank in run_cases(root, 2, [first])] == ["fine", "fine"]
    merge(root / "stage1", root / "merged")
    convert(root / "stage1", root / "original-llava", "llava")
    convert(root / "stage1", root / "adapter", "projector")
    model = LlavaForConditionalGeneration.from_pretrained(root / "merged", dtype=torch.float32)
    model.save_pretrained(root / "by_transformers")
    starts = {
        "run": root / "stage1", "step": step_dir(root / "stage1", 2), "merged": root / "merged",
        "transformers": root / "by_transformers", "original": root / "original-llava", "adapter": root / "adapter",
        "file": root / "adapter" / "mm_projector.bin",
    }
    if projector == "mlp2x_gelu":  # what differs is the projector's part of a layout
        starts = {name: starts[name] for name in ("run", "transformers", "original", "file")}
    cases = [_case(root, f"from-{name}", model__init_from=str(path), model__projector=projector)
             for name, path in starts.items()]
    cases.append(_case(root, "from-nothing", model__projector=projector))
    outcomes = run_cases(root, 2, cases)
    assert [case["outcome"] for case in outcomes[0]] == ["fine"] * (len(starts) + 1)
    runs = {name: root / f"from-{name}" for name in starts}
    expected, weights = read_lines(runs["run"]), read_tensors(step_dir(runs["run"], 2))
    assert len(expected) == 2
    for name, run in runs.items():
        assert read_lines(run) == expected, name
        found = read_tensors(step_dir(run, 2))
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights), name
        sources = read_run(step_dir(run, 2))["initial_weights"]["sources"]
        assert any(Path(file).is_relative_to(starts[name]) for source in sources for file in source["xxh128"]), name
    assert read_lines(root / "from-nothing")[0]["loss"] != expected[0]["loss"]
    loses_words = {name: "words in" in case["output"] for name, case in zip(starts, outcomes[0], strict=False)}
    assert loses_words == {name: name in ("merged", "transformers") for name in starts}
