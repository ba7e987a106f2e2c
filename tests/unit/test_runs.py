"""A run is a whole model on disk: what it trained, what it started from, and its frozen parts from their sources."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from llava_ds.checkpoint.formats.original_export import write_original
from llava_ds.checkpoint.fragments import open_weights, shard_names
from llava_ds.checkpoint.layout import hash_file, step_dir
from llava_ds.checkpoint.load import export_llm, load_model, open_model
from llava_ds.checkpoint.merge import merge
from llava_ds.checkpoint.runs import open_run
from llava_ds.checkpoint.sources import describe_sources
from llava_ds.config import load_recipe
from llava_ds.errors import CheckpointError
from llava_ds.models.build import build_model
from tests.helpers.tiny import write_llm, write_open_clip, write_recipe, write_run, write_world


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)


def _built(world, **changes):
    """The weights of the model that a run starts with, by name."""
    config = load_recipe(str(write_recipe(world, **changes)))
    model = build_model(config.model, "sdpa", torch.float32, seed=21)
    return {name: value.detach() for name, value in model.named_parameters()}


def _check_same(found, expected):
    assert list(found) == list(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name].whole(), value)] == []


def _shard_llm(folder, suffix):
    """The LLM's weights in two files with an index, of either kind."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(weights) // 2
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    weight_map = {}
    for number, names in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        save({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["one file", "safetensors", "bin"])
@pytest.mark.parametrize("trained", [("projector",), ("projector", "llm")])
def test_every_weight_comes_from_where_it_is(world, suffix, trained):
    expected = _built(world)
    if suffix != "one file":
        _shard_llm(world / "llm", suffix)
    run = write_run(world, trained=trained)
    notes = []
    model = open_run(run, log=notes.append)
    _check_same(model.weights, expected)
    assert notes == []
    origins = {name: tensor.origin for name, tensor in model.weights.items()}
    assert {origin for name, origin in origins.items() if name.startswith("vision_tower.")} == {
        str(world / "tower" / "model.safetensors")
    }
    llm = {origin for name, origin in origins.items() if name.startswith("llm.")}
    assert all(origin.startswith(str(world / "llm" if "llm" not in trained else run)) for origin in llm), llm


def test_what_a_run_started_from_covers_what_it_did_not_train(world):
    first = write_run(world, "first", trained=("projector",))
    merge(first, world / "merged")
    second = write_run(world, "second", trained=("llm",), model__init_from=str(world / "merged"))
    third = write_run(world, "third", trained=("llm",), model__init_from=str(second))
    for run in (second, third):
        _check_same(open_run(run).weights, _built(world))  # the words that the merge added are left
    (world / "merged" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="merged/model.safetensors: is gone"):
        open_run(third)


def test_tied_words_stand_once(tmp_path):
    world = write_world(tmp_path)
    shutil.rmtree(world / "llm")
    write_llm(world / "llm", tie_word_embeddings=True)
    for trained in (("projector",), ("projector", "llm")):
        run = write_run(world, "-".join(trained), trained=trained)
        model = open_run(run)
        assert "llm.lm_head.weight" not in model.weights
        _check_same(model.weights, _built(world))
        merge(run, run / "merged")
        loaded = load_model(run / "merged").model.llm
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, model.weights["llm.model.embed_tokens.weight"].whole())


def test_an_llm_with_other_names_in_its_files_is_loaded_whole_and_that_is_said(world):
    config = GPT2Config(vocab_size=355, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(5)
    llm = GPT2LMHeadModel(config)
    for name in ("model.safetensors", "generation_config.json"):
        (world / "llm" / name).unlink()
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(world / "llm")
    # As the first GPT-2 is published: without the prefix of the model in memory.
    state = llm.state_dict().items()
    bare = {name.removeprefix("transformer."): value for name, value in state if name != "lm_head.weight"}
    save_file(bare, world / "llm" / "model.safetensors", {"format": "pt"})
    notes = []
    model = open_run(write_run(world, trained=("projector",)), log=notes.append)
    assert notes == []  # not before a weight is read
    expected = {f"llm.{name}": value for name, value in llm.named_parameters()}
    _check_same({name: value for name, value in model.weights.items() if name.startswith("llm.")}, expected)
    assert len(notes) == 1
    assert "loaded whole" in notes[0]


def test_a_tower_of_open_clip_is_read_from_its_file(world):
    name, clip = write_open_clip(world)
    run = write_run(
        world, trained=("projector",), model__vision_tower=name, model__vision_pretrained=str(world / "clip.pt")
    )
    model = open_run(run)
    expected = {f"vision_tower.visual.{n}": value for n, value in clip.visual.named_parameters() if n != "proj"}
    found = {n: value for n, value in model.weights.items() if n.startswith("vision_tower.")}
    _check_same({n: found[n] for n in expected}, expected)
    assert len(found) == len(expected)


def test_changed_and_missing_frozen_files_are_all_named(world):
    run = write_run(world, trained=("projector",))
    tower, llm = world / "tower" / "model.safetensors", world / "llm" / "model.safetensors"
    was = hash_file(tower)
    content = bytearray(tower.read_bytes())
    content[-1] ^= 1
    tower.write_bytes(content)
    llm.unlink()
    with pytest.raises(CheckpointError) as failure:
        open_run(run)
    text = str(failure.value)
    assert f"{tower}: xxh128 {was[:16]} expected, {hash_file(tower)[:16]} found" in text
    assert f"{llm}: is gone" in text


def test_a_trained_llm_needs_no_file_of_the_frozen_one(world):
    expected = _built(world)
    run = write_run(world)
    (world / "llm" / "model.safetensors").unlink()
    _check_same(open_run(run).weights, expected)


@pytest.mark.parametrize(
    ("changes", "trained", "part", "num_missing"),
    [({}, ("llm",), "projector", 2), ({"model__llm_init": "random"}, ("projector",), "llm", 21)],
)
def test_tensors_without_a_source_are_all_named(world, changes, trained, part, num_missing):
    run = write_run(world, trained=trained, **changes)
    names = [name for name in _built(world) if name.startswith(f"{part}.")]
    assert len(names) == num_missing
    with pytest.raises(CheckpointError, match=f"{num_missing} tensor\\(s\\) have no source") as failure:
        merge(run, world / "out")
    assert [name for name in names if name not in str(failure.value)] == []
    assert not (world / "out").exists()


def test_a_stretch_that_is_in_no_shard_is_refused(world):
    run = write_run(world)
    step = step_dir(run, 4)
    (step / shard_names(1, 3)[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{shard_names(1, 3)[0]}: is missing"):
        open_run(run)


def test_sources_are_recorded_by_hash(world):
    config = load_recipe(str(write_recipe(world))).model
    recorded = describe_sources(config, seed=3)
    files = {
        "vision_tower": [world / "tower" / "tower_config.json", world / "tower" / "model.safetensors"],
        "llm": [world / "llm" / "config.json", world / "llm" / "model.safetensors"],
    }
    for part, expected in files.items():
        assert recorded[part]["files"] == {str(file): hash_file(file) for file in expected}
    random = describe_sources(config.model_copy(update={"llm_init": "random"}), seed=3)["llm"]
    assert (random["init"], random["seed"], random["files"]) == ("random", 3, {})


INVALID = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "bos_token_id": 1}


@pytest.mark.parametrize("settings", [INVALID, INVALID | {"do_sample": True}, None])
def test_an_llm_is_exported_whatever_its_generation_config_says(world, settings):
    """The one of vicuna-7b-v1.5 cannot be saved again by transformers; the projector did not train."""
    file = world / "llm" / "generation_config.json"
    file.unlink(missing_ok=True)
    if settings:
        file.write_text(json.dumps(settings))
    run = write_run(world, trained=("llm",), model__llm_init="random")
    export_llm(run, world / "out")
    llm = AutoModelForCausalLM.from_pretrained(world / "out")
    expected = {name.removeprefix("llm."): value.whole() for name, value in open_weights(step_dir(run, 4)).items()}
    assert {name: True for name in expected} == {
        name: torch.equal(value, expected[name]) for name, value in llm.named_parameters()
    }
    exported = GenerationConfig.from_pretrained(world / "out")
    exported.validate(strict=True)
    assert exported.eos_token_id == 2
    assert (exported.temperature == 0.9) == bool(settings and settings["do_sample"])
    _check_same(  # and it is an LLM to train with
        {name: value for name, value in open_run(
            write_run(world, "next", trained=("projector",), model__llm=str(world / "out"))
        ).weights.items() if name.startswith("llm.")},
        {f"llm.{name}": value for name, value in expected.items()},
    )


def test_a_folder_that_is_a_projector_alone_is_no_model(world):
    torch.save({"model.mm_projector.weight": torch.ones(2, 2)}, world / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=re.escape("is a projector alone; start a run from it")):
        open_model(world / "mm_projector.bin")


@pytest.mark.parametrize("layout", ["run", "merged", "original"])
def test_a_model_is_loaded_from_every_layout(world, layout, capsys):
    expected = open_run(write_run(world)).weights
    merge(world / "run", world / "merged")
    (world / "original").mkdir()
    write_original(replace(open_run(world / "run"), template="v1"), world / "original", 10**9)
    if layout == "original":  # as the code of others writes it, without a word of ours about the template
        config = json.loads((world / "original" / "config.json").read_text())
        del config["llava_ds"]["template"]
        (world / "original" / "config.json").write_text(json.dumps(config))
    loaded = load_model(world / layout)
    state = loaded.model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(state[name], value.whole())] == []
    assert loaded.template == {"original": "v1"}.get(layout, "short")
    assert ("v1 is taken, LLaVA-1.5's" in capsys.readouterr().err) == (layout == "original")
