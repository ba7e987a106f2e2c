"""lmms-eval itself scores an exported checkpoint, and finds the answers that tools/evaluate finds.

It has an environment of its own (`make lmms-eval-test`), as it pins packages that this project has in other versions.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_ds.checkpoint.merge import merge
from llava_ds.evaluation.exact_match import MAX_NEW_TOKENS, read_questions, score
from llava_ds.evaluation.predict import predict
from llava_ds.inference.session import Sampling, load_session
from tests.helpers.launch import ROOT, clean_environ, run_cases
from tests.helpers.tiny import write_recipe, write_world

pytestmark = pytest.mark.lmms_eval

PYTHON = ROOT / ".venv-lmms-eval" / "bin" / "python"
ANSWERS = ("a red fox", "two green apples", "on the left")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """``merged``, a model that tells pictures apart, and questions about them, one of them with a wrong answer."""
    root = write_world(tmp_path_factory.mktemp("lmms_eval"))
    folder = root / "pictures"
    folder.mkdir()
    records, questions = [], []
    for number in range(6):
        pixels = np.full((44 + number, 50, 3), 40 * number + 20, np.uint8)
        pixels[:, :25] = 255 - 40 * number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        answer = ANSWERS[number % 3]
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        questions.append({"id": str(number), "image": f"{number}.png", "kind": "thing", "question": "What is this?",
                          "answer": answer if number else "a blue fox"})
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "eval.json").write_text(json.dumps(questions))
    recipe = write_recipe(root, data__path=str(folder / "train.json"), data__placement="front", train__max_steps=80,
                          train__epochs=80, train__learning_rate=5e-3, train__global_batch_size=6,
                          train__micro_batch_size=6)
    case = {"recipe": str(recipe), "zero": "zero1", "run_dir": str(root / "run")}
    assert run_cases(root, 1, [case])[0][0]["outcome"] == "fine"
    merge(root / "run", root / "merged")
    return root


@pytest.mark.parametrize("options", [[], ["--force_simple"]], ids=["chat", "simple"])
def test_lmms_eval_finds_our_answers(world, options):
    out = world / f"out-{len(options)}"
    command = [str(PYTHON), "-m", "lmms_eval", "--model", "llava_hf", "--batch_size", "1", "--tasks", "pictures"]
    command += ["--model_args", f"pretrained={world / 'merged'},device=cpu,device_map=cpu"]
    command += ["--include_path", str(ROOT / "docs" / "examples" / "lmms_eval"), "--output_path", str(out)]
    environ = clean_environ() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(world / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    environ["PATH"] = os.pathsep.join([str(PYTHON.parent), environ["PATH"]])
    done = subprocess.run([*command, "--log_samples", *options], cwd=world / "pictures", env=environ,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_pictures.jsonl")
    questions = read_questions(world / "pictures" / "eval.json")
    answers = predict(questions, lambda: load_session(world / "merged"), Sampling(MAX_NEW_TOKENS), batch_size=64)
    ours = score(questions, answers)
    theirs = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, samples.read_text().splitlines())}
    assert [theirs[number].strip() for number in range(6)] == [one["prediction"] for one in ours["records"]]
    assert [one["prediction"] for one in ours["records"]] == list(ANSWERS * 2)
    accuracy = json.loads(results.read_text())["results"]["pictures"]["exact_match,none"]
    assert accuracy == pytest.approx(ours["accuracy"]["thing"]) == pytest.approx(5 / 6)
