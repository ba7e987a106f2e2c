"""The commands over a run: right input gives an answer, bad input a reason and exit code 1."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_ds.checkpoint.layout import commit, step_dir
from llava_ds.config import load_recipe
from llava_ds.models.build import build_model
from tests.helpers.tiny import write_recipe, write_world

ROOT = Path(__file__).parents[2]


def _tool(name: str, *options: object, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, options)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The tiny world, with a committed run of random weights in ``run``."""
    root = write_world(tmp_path_factory.mktemp("tools"))
    config = load_recipe(str(write_recipe(root)))
    model = build_model(config.model, "sdpa", torch.float32, seed=3)
    step = step_dir(root / "run", 4)
    step.mkdir(parents=True)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("vision_tower")}
    save_file(trained, step / "trainable.safetensors")
    (step / "run.json").write_text(json.dumps({"config": config.model_dump()}))
    commit(step)
    question = {"id": "q", "image": "0.png", "kind": "name", "question": "What is this?", "answer": "a red fox"}
    (root / "data" / "questions.json").write_text(json.dumps([question]))
    (root / "data" / "broken.json").write_text("[{")
    (root / "data" / "broken.png").write_bytes(b"no picture")
    return root


def test_merge_then_evaluate_then_chat(world):
    merged = _tool("merge_ckpt", world / "run", world / "merged")
    assert merged.returncode == 0, merged.stderr
    assert (world / "merged" / "config.json").is_file()
    assert _tool("merge_ckpt", world / "run", world / "merged").returncode == 1  # never over an existing folder

    scores = world / "scores.json"
    scored = _tool("evaluate", world / "merged", "--questions", world / "data" / "questions.json", "--json", scores)
    assert scored.returncode == 0, scored.stderr
    written = json.loads(scores.read_text())
    assert written["num_questions"] == {"name": 1}
    assert json.loads(scored.stdout)["accuracy"] == written["accuracy"]

    options = (world / "merged", "--image", world / "data" / "0.png", "--max-new-tokens", "4")
    once = _tool("chat", *options, "--prompt", "What is this?")
    assert once.returncode == 0, once.stderr
    talked = _tool("chat", *options, stdin="What is this?\n\n")
    assert talked.returncode == 0, talked.stderr
    assert once.stdout.strip() in talked.stdout  # greedy: the same answer


@pytest.mark.parametrize(
    ("tool", "options", "message"),
    [
        ("merge_ckpt", ["nowhere", "out"], "nowhere"),
        ("evaluate", ["nowhere", "--questions", "{data}/questions.json"], "nowhere"),
        ("evaluate", ["{run}", "--questions", "{data}/none.json"], "no such file"),
        ("evaluate", ["{run}", "--questions", "{data}/broken.json"], "not valid JSON"),
        ("chat", ["nowhere", "--prompt", "Hi"], "nowhere"),
        ("chat", ["{run}", "--image", "{data}/broken.png", "--prompt", "Hi"], "broken.png"),
        ("chat", ["{run}", "--image", "{data}/none.png", "--prompt", "Hi"], "none.png"),
    ],
)
def test_bad_input_ends_with_its_reason(world, tmp_path, monkeypatch, tool, options, message):
    monkeypatch.chdir(tmp_path)
    filled = [option.format(data=world / "data", run=world / "run") for option in options]
    done = _tool(tool, *filled)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
