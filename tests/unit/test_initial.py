"""A run keeps to the weights that it started from, in whichever layout they are: by file and hash, as far as needed."""

import json
import os
import re
import shutil
import time

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_ds.checkpoint import sources
from llava_ds.checkpoint.formats.original_export import write_original
from llava_ds.checkpoint.formats.transformers import read_transformers
from llava_ds.checkpoint.fragments import open_weights, shard_names
from llava_ds.checkpoint.initial import InitialWeights, apply_weights, open_initial, reopen_initial
from llava_ds.checkpoint.layout import hash_file, step_dir
from llava_ds.checkpoint.lazy import in_memory
from llava_ds.checkpoint.merge import merge
from llava_ds.config import load_recipe
from llava_ds.distributed import Ranks
from llava_ds.engine.setup import load_initial_weights
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.build import build_model
from tests.helpers.tiny import write_recipe, write_run, write_step, write_world

SHARDS = [shard_names(rank, 3)[0] for rank in range(3)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("initial"))


def _write(run, weights, record=None):
    values = {name: torch.full((7,), value) for name, value in weights.items()}
    return write_step(run, values, {"initial_weights": record or InitialWeights().record}, number=1)


def _values(initial):
    return {name: tensor.whole()[0].item() for name, tensor in initial.weights.items()}


def _copy(parameter, value):
    parameter.data.copy_(value.whole())


def test_weights_come_from_the_run_itself_and_then_from_what_it_started_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = _write(tmp_path / "a", {"projector": 1.0})
    second = _write(tmp_path / "b", {"llm": 2.0}, open_initial(tmp_path.relative_to(tmp_path) / "a").record)
    third = _write(tmp_path / "c", {"llm": 3.0}, open_initial(tmp_path / "b").record)
    monkeypatch.chdir("/")
    for run, step, llm in [("b", second, 2.0), ("c", third, 3.0)]:
        initial = open_initial(tmp_path / run)
        assert _values(initial) == {"llm": llm, "projector": 1.0}
        # What is between them is not needed: a run names the one that trained a weight.
        assert [source["path"] for source in initial.record["sources"]] == [str(step), str(first)]
        assert initial.record["weights"] == {"llm": 0, "projector": 1}
    shutil.rmtree(tmp_path / "b")
    assert _values(open_initial(tmp_path / "c")) == {"llm": 3.0, "projector": 1.0}


def test_a_record_names_every_file_by_its_hash(tmp_path):
    step = _write(tmp_path / "a", {"projector": 1.0, "llm": 2.0})
    (source,) = open_initial(tmp_path / "a").record["sources"]
    files = [step / name for name in SHARDS]
    assert source["xxh128"] == {str(file): hash_file(file) for file in (*files, step / "step.json")}


def test_other_weights_in_the_place_of_the_first_are_refused(tmp_path):
    first = _write(tmp_path / "a", {"projector": 1.0})
    step = _write(tmp_path / "b", {"llm": 2.0}, open_initial(tmp_path / "a").record)
    record = json.loads((step / "run.json").read_text())["initial_weights"]
    was = hash_file(first / SHARDS[0])
    shutil.rmtree(tmp_path / "a")
    _write(tmp_path / "a", {"projector": 9.0})
    now = hash_file(first / SHARDS[0])
    for reopen in (lambda: open_initial(tmp_path / "b"), lambda: reopen_initial(record, step, ["projector"])):
        with pytest.raises(CheckpointError, match=f"xxh128 {was[:16]} expected, {now[:16]} found") as failure:
            reopen()
        assert str(failure.value).count("expected") == 3  # every shard is named
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"{SHARDS[2]}: is gone"):
        open_initial(tmp_path / "b")


def test_a_damaged_shard_is_refused_before_a_run_starts_from_it(tmp_path):
    step = _write(tmp_path / "a", {"projector": 1.0})
    file = step / SHARDS[2]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}: xxh128 [0-9a-f]+ expected, [0-9a-f]+ found"):
        open_initial(tmp_path / "a")


def test_a_run_that_trained_everything_needs_no_other(tmp_path):
    _write(tmp_path / "a", {"projector": 1.0})
    _write(tmp_path / "b", {"projector": 2.0}, open_initial(tmp_path / "a").record)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert _values(open_initial(tmp_path / "b")) == {"projector": 2.0}


def test_a_step_is_known_by_what_is_in_it(tmp_path):
    step = _write(tmp_path / "a", {"projector": 1.0})
    step.rename(tmp_path / "the best one")
    assert _values(open_initial(tmp_path / "the best one")) == {"projector": 1.0}


def test_a_run_does_not_start_from_the_folder_that_it_takes(tmp_path):
    run = write_run(write_world(tmp_path))
    config = load_recipe(str(write_recipe(tmp_path)))
    model = build_model(config.model, "sdpa", torch.float32, seed=3)
    record = load_initial_weights(model, str(run), tmp_path / "other", Ranks(0, 0, 1))
    weights = open_weights(step_dir(run, 4))
    assert set(record["weights"]) == set(weights)
    assert set(weights) == {name for name, _ in model.named_parameters() if not name.startswith("vision_tower")}
    assert all(torch.equal(dict(model.named_parameters())[name], value.whole()) for name, value in weights.items())
    with pytest.raises(ConfigError, match="give another --run-dir"):
        load_initial_weights(model, str(run), run, Ranks(0, 0, 1))


def _rewrite(merged, out):
    """The folder as transformers itself writes it, in a file of its own layout."""
    shutil.copytree(merged, out)
    for name in ("llava_ds.json", "COMPLETE", "manifest.json", "model.safetensors"):
        (out / name).unlink()
    LlavaForConditionalGeneration.from_pretrained(merged).save_pretrained(out)


def _write_projector(merged, out):
    weights = open_initial(merged).weights
    out.mkdir()
    own = {f"model.mm_{name}": tensor.whole() for name, tensor in weights.items() if name.startswith("projector.")}
    torch.save(own, out / "mm_projector.bin")


def _write_original(merged, out):
    out.mkdir()
    write_original(read_transformers(merged), out, 10**9)


LAYOUTS = {
    "merged": (lambda merged, out: shutil.copytree(merged, out), "transformers", True, True),
    "transformers": (_rewrite, "transformers", True, True),
    "original": (_write_original, "original", True, False),
    "projector": (_write_projector, "projector", False, False),
}


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_starts_from_any_layout(world, tmp_path, name, projector):
    prepare, layout, has_llm, adds_words = LAYOUTS[name]
    run = write_run(world, f"run-{name}-{projector}", model__projector=projector)
    merge(run, tmp_path / "merged")
    prepare(tmp_path / "merged", tmp_path / "source")
    initial = open_initial(tmp_path / "source")
    own = open_initial(run).weights
    expected = {key: value.whole() for key, value in own.items() if has_llm or key.startswith("projector.")}
    assert set(initial.weights) == set(expected)
    assert [source["layout"] for source in initial.record["sources"]] == [layout]
    config = load_recipe(str(write_recipe(world, model__projector=projector))).model
    model = build_model(config, "sdpa", torch.float32, seed=3)
    notes = apply_weights(model, initial.weights, _copy)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in expected.items())
    # The words that the merge added are left, and that is said.
    tables = ["llm.lm_head.weight", "llm.model.embed_tokens.weight"] if adds_words else []
    assert sorted(note.split(":")[0] for note in notes) == tables
    again = reopen_initial(json.loads(json.dumps(initial.record)), tmp_path, list(expected))
    assert all(torch.equal(again[key].whole()[: len(value)], value) for key, value in expected.items())


def test_weights_that_do_not_fit_are_all_named(world):
    model = build_model(load_recipe(str(write_recipe(world))).model, "sdpa", torch.float32, seed=3)
    before = model.projector.bias.clone()
    weights = {
        "projector.bias": in_memory(torch.ones(64)),
        "projector.weight": in_memory(torch.ones(63, 32)),
        "projector.0.weight": in_memory(torch.ones(64, 32)),
        "llm.lm_head.weight": in_memory(torch.ones(9, 64)),  # fewer words than the model's
        "llm.model.embed_tokens.weight": in_memory(torch.ones(999, 63)),
    }
    with pytest.raises(CheckpointError) as failure:
        apply_weights(model, weights, _copy)
    lines = str(failure.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [name for name in weights if name != "projector.bias"]
    assert torch.equal(model.projector.bias, before)


def test_what_is_no_checkpoint_is_refused_with_what_is_accepted(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"(?s)merged folder.*llava-hf.*original LLaVA.*mm_projector\.bin"):
            open_initial(path)


def test_a_hash_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    hashed = []
    monkeypatch.setattr(sources, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    first = sources.hash_of(file)
    assert first == hash_file(file)
    sources.hash_of(file)
    assert len(hashed) == 2  # it was written just now, and may be written again within a tick of the clock
    old = time.time() - 10
    os.utime(file, (old, old))
    assert sources.hash_of(file) == sources.hash_of(file) == first
    assert len(hashed) == 3
    assert sources.hash_of(file, fresh=True) == first
    assert len(hashed) == 4
    file.write_bytes(b"two")
    os.utime(file, (old, old))  # of the same size and age
    assert sources.hash_of(file) == hash_file(file) != first
