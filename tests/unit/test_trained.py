"""A run keeps to the weights that it started from: by file and hash, and only as far as it needs them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llava_ds.checkpoint.layout import commit, step_dir
from llava_ds.checkpoint.trained import describe_initial_weights, locate_trained
from llava_ds.config import load_recipe
from llava_ds.distributed import Ranks
from llava_ds.engine.setup import load_initial_weights
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.build import build_model
from tests.helpers.tiny import write_recipe, write_run, write_world


def _write_step(run_dir, weights, initial):
    step = step_dir(run_dir, 1)
    step.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2,), value) for name, value in weights.items()}, step / "trainable.safetensors")
    (step / "run.json").write_text(json.dumps({"initial_weights": describe_initial_weights(initial)}))
    commit(step)
    return step / "trainable.safetensors"


def test_weights_come_from_the_run_itself_and_then_from_what_it_started_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = _write_step(tmp_path / "a", {"projector": 1.0}, {})
    second = _write_step(tmp_path / "b", {"llm": 2.0}, locate_trained(tmp_path / "a"))
    third = _write_step(tmp_path / "c", {"llm": 3.0}, locate_trained(tmp_path / "b"))
    monkeypatch.chdir("/")
    assert locate_trained(tmp_path / "b") == {"llm": second, "projector": first}
    assert locate_trained(tmp_path / "c") == {"llm": third, "projector": first}


def test_other_weights_in_the_place_of_the_first_are_refused(tmp_path):
    _write_step(tmp_path / "a", {"projector": 1.0}, {})
    _write_step(tmp_path / "b", {"llm": 2.0}, locate_trained(tmp_path / "a"))
    file = _write_step(tmp_path / "a", {"projector": 9.0}, {})
    with pytest.raises(CheckpointError, match="started from other weights than"):
        locate_trained(tmp_path / "b")
    file.unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        locate_trained(tmp_path / "b")


def test_a_run_that_trained_everything_needs_no_other(tmp_path):
    _write_step(tmp_path / "a", {"projector": 1.0}, {})
    file = _write_step(tmp_path / "b", {"projector": 2.0}, locate_trained(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "moved")
    assert locate_trained(tmp_path / "b") == {"projector": file}


def test_a_run_does_not_start_from_the_folder_that_it_takes(tmp_path):
    run = write_run(write_world(tmp_path))
    config = load_recipe(str(write_recipe(tmp_path)))
    model = build_model(config.model, "sdpa", torch.float32, seed=3)
    located = load_initial_weights(model, str(run), tmp_path / "other", Ranks(0, 0, 1))
    assert set(located) == {name for name, _ in model.named_parameters() if not name.startswith("vision_tower")}
    with pytest.raises(ConfigError, match="give another --run-dir"):
        load_initial_weights(model, str(run), run, Ranks(0, 0, 1))
