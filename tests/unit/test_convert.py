"""Every layout goes to every other and back: the same tensors, the same logits, or an error that says what lacks."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava_ds.checkpoint import parity, writer
from llava_ds.checkpoint.conversion.request import POSSIBLE, SOURCES, TARGETS, Options
from llava_ds.checkpoint.convert import convert, detect_layout
from llava_ds.checkpoint.formats import clip as clip_module
from llava_ds.checkpoint.formats.clip import (
    StoredTower,
    published_name,
    read_clip,
    read_tower,
    write_clip,
    write_tower_folder,
)
from llava_ds.checkpoint.formats.original import read_original, read_original_weights
from llava_ds.checkpoint.formats.original_config import original_config, text_config_of
from llava_ds.checkpoint.formats.original_export import own_vocabulary, write_original
from llava_ds.checkpoint.formats.projector_file import read_projector_file
from llava_ds.checkpoint.formats.transformers import read_transformers
from llava_ds.checkpoint.layout import find_damage
from llava_ds.checkpoint.lazy import in_memory
from llava_ds.checkpoint.load import export_llm
from llava_ds.checkpoint.merge import merge
from llava_ds.checkpoint.runs import open_run
from llava_ds.checkpoint.shard_size import parse_size
from llava_ds.data.images import open_image
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.build import load_tokenizer
from llava_ds.models.vision_tower import TowerSpec, build_tower_from_spec, read_tower_spec
from tests.helpers.commands import invoke
from tests.helpers.tiny import (
    IMAGE_SIZE,
    LLM_WIDTH,
    PATCH,
    VISION_WIDTH,
    write_llm,
    write_open_clip,
    write_run,
    write_world,
)

ROOT = Path(__file__).parents[2]
KINDS = ("linear", "mlp2x_gelu")
MODELS = ("llava_ds", "transformers", "llava")
STARTS = ("llava_ds", "llava")
"""Of two folders: what is written as llava_ds and as transformers has the same files (see below)."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def runs(world):
    return {kind: write_run(world, f"run-{kind}", model__projector=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def exports(world, runs):
    """A folder in each layout of each kind of projector."""
    made = {}
    for kind, run in runs.items():
        for target in (*MODELS, "projector", "clip", "tower"):
            made[kind, target] = world / f"llava-{kind}-{target}"
            convert(run, made[kind, target], target)
    return made


def _files(folder):
    """Name and content of every file that does not say when, or from what, the folder was made."""
    changing = ("parity.json", "manifest.json", "COMPLETE")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in changing}


def _same(found, expected):
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for name, value in expected.items():
        assert found[name].dtype is value.dtype, name
        assert torch.equal(found[name].whole(), value.whole()), name


def _settings(model):
    return {name: getattr(model, name) for name in (
        "tower", "select_layer", "projector", "template", "image_aspect_ratio", "zero_features", "dtype",
    )}


def _read(layout, folder):
    return read_original(folder) if layout == "llava" else read_transformers(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", MODELS)
def test_every_layout_of_a_model_reads_back_as_the_run(runs, exports, kind, layout):
    expected, found = open_run(runs[kind]), _read(layout, exports[kind, layout])
    _same(found.weights, expected.weights)
    assert _settings(found) == _settings(expected)
    changing = {"dtype", "architectures", "_name_or_path", "transformers_version"}
    assert {key: value for key, value in found.text_config.items() if key not in changing} == {
        key: value for key, value in expected.text_config.items() if key not in changing
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("end", MODELS)
def test_every_pair_of_layouts_keeps_every_bit(runs, exports, tmp_path, kind, start, end):
    out = tmp_path / "llava-out"
    done = convert(exports[kind, start], out, end)
    assert done.source_layout == start
    _same(_read(end, out).weights, open_run(runs[kind]).weights)
    assert _settings(_read(end, out)) == _settings(open_run(runs[kind]))
    assert [item.reader for item in done.comparisons] == {
        "llava_ds": ["transformers", "llava_ds"], "transformers": ["transformers"], "llava": ["llava_ds"],
    }[end]
    assert all(item.largest_value > 0.1 and item.relative < 1e-5 for item in done.comparisons)
    written = json.loads((out / "parity.json").read_text())
    assert written["comparisons"] == [item.as_dict() for item in done.comparisons]
    assert find_damage(out) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_is_llava_ds_and_transformers_in_one(runs, exports, tmp_path, kind):
    merge(runs[kind], tmp_path / "merged")
    merged = _files(tmp_path / "merged")
    assert len(merged) == 9
    for layout in ("llava_ds", "transformers"):
        assert _files(exports[kind, layout]) == merged
    assert detect_layout(exports[kind, "transformers"]) == "llava_ds"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS)
def test_the_parts_of_a_model_are_the_runs(runs, exports, tmp_path, kind, start):
    expected = open_run(runs[kind])
    parts = {part: {name.removeprefix(f"{part}."): value for name, value in expected.weights.items()
                    if name.startswith(f"{part}.")} for part in ("projector", "vision_tower.visual")}
    for target in ("projector", "clip", "tower"):
        done = convert(exports[kind, start], tmp_path / target, target)
        assert len(done.comparisons) == 1
    _same(read_projector_file(tmp_path / "projector" / "mm_projector.bin"), parts["projector"])
    for target in ("clip", "tower"):
        tower = read_tower(str(tmp_path / target))
        _same(tower.weights, parts["vision_tower.visual"])
        assert tower.spec == expected.tower


@pytest.mark.parametrize(("kind", "target", "tower"), [
    ("linear", "llava_ds", "clip"), ("mlp2x_gelu", "transformers", "tower"), ("mlp2x_gelu", "llava", "clip"),
])
def test_parts_make_the_model_again(world, runs, exports, tmp_path, kind, target, tower):
    llm, out = tmp_path / "llm", tmp_path / "llava-again"
    export_llm(runs[kind], llm)
    options = Options(llm=llm, vision_tower=str(exports[kind, tower]), template="short")
    convert(exports[kind, "projector"] / "mm_projector.bin", out, target, options=options)
    _same(_read(target, out).weights, open_run(runs[kind]).weights)
    assert _settings(_read(target, out)) == _settings(open_run(runs[kind]))


def test_clip_and_tower_become_one_another(exports, tmp_path):
    expected = read_tower(str(exports["linear", "tower"]))
    convert(exports["linear", "tower"], tmp_path / "clip", "clip")
    done = convert(tmp_path / "clip", tmp_path / "tower", "tower", options=Options(select_layer=-3))
    assert (done.source_layout, done.comparisons[0].largest_difference) == ("clip", 0)
    _same(read_tower(str(tmp_path / "tower")).weights, expected.weights)
    assert read_tower_spec(tmp_path / "tower") == expected.spec


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_answers_from_what_was_another_layout(world, exports, tmp_path, kind):
    """AutoProcessor and generate, from the original layout, say what they say from the merged folder."""
    convert(exports[kind, "llava"], tmp_path / "out", "transformers")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    answers = []
    for folder in (exports[kind, "llava_ds"], tmp_path / "out"):
        processor = AutoProcessor.from_pretrained(folder)
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=[open_image(world / "data" / "0.png")], return_tensors="pt")
        answers.append(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
        assert answers[-1].count(processor.image_token_id) == 9
        assert len(answers[-1]) > inputs["input_ids"].shape[1]
    assert answers[0] == answers[1]


def test_tied_embeddings_stay_tied(tmp_path):
    world = write_world(tmp_path)
    shutil.rmtree(world / "llm")
    write_llm(world / "llm", tie_word_embeddings=True)
    run = write_run(world)
    for target in MODELS:
        out = tmp_path / f"llava-{target}"
        convert(run, out, target)
        names = load_file(out / "model.safetensors").keys()
        assert not any("lm_head" in name for name in names)
        model = _read(target, out)
        assert model.text_config["tie_word_embeddings"] is True
        _same(model.weights, open_run(run).weights)


def test_a_qwen2_goes_to_transformers_and_back_and_nowhere_else(tmp_path):
    """Its attention has biases, and its table more rows than the tokenizer words."""
    world = write_world(tmp_path)
    config = Qwen2Config(
        vocab_size=377, hidden_size=LLM_WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(world / "llm")
    run = write_run(world)
    done = convert(run, tmp_path / "out", "transformers")
    assert done.comparisons[0].relative < 1e-5
    convert(tmp_path / "out", tmp_path / "again", "llava_ds")
    for folder in ("out", "again"):
        _same(read_transformers(tmp_path / folder).weights, open_run(run).weights)
    with pytest.raises(ConfigError, match="its LLM is of the type qwen2; only llama and mistral"):
        convert(run, tmp_path / "never", "llava")
    with pytest.raises(CheckpointError, match="the LLM is 'qwen2'; only llama and mistral"):
        convert(run, tmp_path / "never", "gguf")
    projector = convert(run, tmp_path / "projector", "projector")
    assert "there is no config.json beside it" in projector.notes[0]


@pytest.mark.parametrize(("act", "export"), [("relu", "relu_pair"), ("gelu", "gelu_pair"), ("linear", "identity")])
def test_a_linear_projector_is_written_with_the_asked_activation(runs, tmp_path, act, export):
    done = convert(runs["linear"], tmp_path / "out", "transformers", options=Options(projector_act=act))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["projector_hidden_act"] == act
    assert json.loads((tmp_path / "out" / "llava_ds.json").read_text())["projector_export"] == export
    # fp32; gelu's two halves are rounded apart. Logits are of size 1.
    assert done.comparisons[0].relative < 1e-5
    _same(read_transformers(tmp_path / "out").weights, open_run(runs["linear"]).weights)
    (tmp_path / "out" / "llava_ds.json").unlink()  # as of another's folder: the tensors tell the pair
    _same(read_transformers(tmp_path / "out").weights, open_run(runs["linear"]).weights)


def _write_tower(folder, width, heads, act="gelu", mean=(0.5,) * 3, std=(0.5,) * 3, size=(IMAGE_SIZE, PATCH)):
    spec = TowerSpec(*size, width, 2, heads, 64, 1e-5, act, mean, std, "bicubic")
    weights = {name: in_memory(value) for name, value in build_tower_from_spec(spec, -2).visual.state_dict().items()}
    folder.mkdir()
    write_tower_folder(StoredTower(spec, weights), folder, torch.float32)
    return spec


def test_a_narrow_llm_takes_the_identity_or_says_why_not(tmp_path):
    """The tower's 40 are more than half of the LLM's 64."""
    write_llm(tmp_path / "llm")
    _write_tower(tmp_path / "tower", 40, 5)
    run = write_run(tmp_path)
    done = convert(run, tmp_path / "out", "transformers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["projector_hidden_act"] == "linear"
    assert done.comparisons[0].relative < 1e-5
    for act in ("relu", "gelu"):
        with pytest.raises(ConfigError, match="they are 64 and 40 wide"):
            convert(run, tmp_path / "never", "transformers", options=Options(projector_act=act))
    with pytest.raises((CheckpointError, ConfigError), match="64"):
        convert(run, tmp_path / "never", "gguf")
    assert not (tmp_path / "never").exists()


# What transformers itself writes.


@pytest.fixture(scope="module")
def foreign(world, tmp_path_factory):
    """A LLaVA as transformers saves it, with the two words of llava-hf's vocabulary."""
    folder = tmp_path_factory.mktemp("foreign") / "llava-hf"
    tokenizer = load_tokenizer(str(world / "llm"))
    num_words = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    vision = CLIPVisionConfig(hidden_size=VISION_WIDTH, intermediate_size=64, num_hidden_layers=3,
                              num_attention_heads=2, image_size=IMAGE_SIZE, patch_size=PATCH)
    text = LlamaConfig(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=LLM_WIDTH, intermediate_size=96,
                       num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(31)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=num_words, image_seq_length=9,
                         pad_token_id=num_words + 1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = LlavaImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE)
    LlavaProcessor(images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1).save_pretrained(folder)
    return folder, num_words


@pytest.mark.parametrize("target", MODELS)
def test_a_folder_that_transformers_saved_becomes_every_layout(foreign, tmp_path, target):
    folder, num_words = foreign
    done = convert(folder, tmp_path / "llava-out", target, options=Options(template="v1"))
    assert done.source_layout == "transformers"
    expected = load_file(folder / "model.safetensors")
    found = _read(target, tmp_path / "llava-out")
    words = found.weights["llm.model.embed_tokens.weight"].whole()
    assert words.shape == (num_words, LLM_WIDTH)  # the LLM's own; 64 fills and two added words are none of them
    assert torch.equal(words, expected["language_model.model.embed_tokens.weight"][:num_words])
    assert torch.equal(found.weights["projector.2.bias"].whole(), expected["multi_modal_projector.linear_2.bias"])
    conv = found.weights["vision_tower.visual.conv1.weight"].whole()
    assert torch.equal(conv, expected["vision_tower.embeddings.patch_embedding.weight"])
    assert (found.template, found.projector, found.tower.act) == ("v1", "mlp2x_gelu", "quick_gelu")


def test_a_foreign_folder_is_read_in_any_files_and_precision(foreign, tmp_path):
    """In several safetensors and in several .bin files, in bf16."""
    folder, _ = foreign
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    shutil.copytree(folder, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    shutil.copytree(tmp_path / "sharded", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    renamed = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": renamed}))
    for file in set(index["weight_map"].values()):
        torch.save(load_file(tmp_path / "sharded" / file), tmp_path / "bin" / file.replace(".safetensors", ".bin"))
    expected = read_transformers(folder, "v1")
    for kind in ("sharded", "bin"):
        found = read_transformers(tmp_path / kind, "v1")
        assert found.dtype is torch.bfloat16
        _same(found.weights, {name: value.cast(torch.bfloat16) for name, value in expected.weights.items()})


def test_added_words_are_left_out_of_the_original_layout_and_come_back(foreign, tmp_path):
    folder, num_words = foreign
    convert(folder, tmp_path / "llava", "llava", options=Options(template="v1"))
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    tokenizer = load_tokenizer(str(tmp_path / "llava"))
    assert config["vocab_size"] == len(tokenizer) == num_words
    assert "<image>" not in tokenizer.get_vocab()
    assert load_file(tmp_path / "llava" / "model.safetensors")["lm_head.weight"].shape == (num_words, LLM_WIDTH)
    convert(tmp_path / "llava", tmp_path / "again", "transformers")
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    assert (processor.image_token_id, len(processor.tokenizer)) == (num_words, num_words + 2)
    text = "Q: What is  this?\nA: a red fox"
    assert processor.tokenizer(text).input_ids == load_tokenizer(str(folder))(text).input_ids


@pytest.mark.parametrize(
    ("added", "rows", "expected"),
    [
        ([], 0, (355, 355)), (["<image>", "<pad>"], 2, (355, 355)), (["<image>", "<pad>"], 29, (355, 355)),
        (["<pad>", "<image>"], 2, (355, 355)), (["<image>"], 1, (355, 355)), (["<image>", "<pad>"], 0, (355, 355)),
        (["<image>", "<pad>"], 200, (555, 355)), (["<pad>"], 1, (356, 356)), (["<image>", "<im_end>"], 2, (357, 357)),
        (["<im_end>", "<image>", "<pad>"], 29, (356, 356)), (["<pad>", "<im_end>", "<image>"], 3, (357, 357)),
    ],
)
def test_only_words_that_an_export_added_are_left_out(runs, added, rows, expected):
    """``<image>`` and ``<pad>`` at the very end; an own ``<pad>`` stays, and so do rows that nothing explains."""
    model = open_run(runs["linear"])
    model.tokenizer.add_tokens(added, special_tokens=True)
    assert model.text_config["vocab_size"] == 355
    model = replace(model, text_config=model.text_config | {"vocab_size": 355 + rows})
    assert own_vocabulary(model) == expected


# The original layout.


def test_the_original_layout_is_what_its_code_asks_for(runs, exports):
    folder = exports["mlp2x_gelu", "llava"]
    names = load_file(folder / "model.safetensors").keys()
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.mm_projector.0.weight",
            "model.mm_projector.2.bias", "model.layers.1.mlp.up_proj.weight"} < names
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names
    assert all(name.startswith(("model.", "lm_head.")) for name in names)
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": VISION_WIDTH,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "rope_theta": 10000.0,
        "image_aspect_ratio": "square", "rope_scaling": None, "torch_dtype": "float32", "hidden_size": LLM_WIDTH,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert Path(config["mm_vision_tower"]) == folder / "vision_tower"
    # As its code takes features: hidden_states[select_layer] without the class token.
    theirs = CLIPVisionModel.from_pretrained(config["mm_vision_tower"]).eval()
    pixels = CLIPImageProcessor.from_pretrained(config["mm_vision_tower"])(
        torch.zeros(3, 50, 60, dtype=torch.uint8), return_tensors="pt"
    ).pixel_values
    assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    ours = build_tower_from_spec(open_run(runs["linear"]).tower, -2)
    ours.visual.load_state_dict({n: v.whole() for n, v in read_tower(str(folder / "vision_tower")).weights.items()})
    with torch.no_grad():
        features = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        # fp32 sums in another order; features are of size 1.
        torch.testing.assert_close(features, ours(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["run", "merged"])
def test_the_slow_tokenizer_gets_its_file(world, runs, exports, tmp_path, start):
    folder = exports["linear", "llava"]
    if start == "merged":
        folder = tmp_path / "llava"
        done = convert(exports["linear", "llava_ds"], folder, "llava", options=Options(compares_logits=False))
        assert not any("tokenizer.model" in note for note in done.notes)
    assert (folder / "tokenizer.model").read_bytes() == (world / "llm" / "tokenizer.model").read_bytes()
    assert not (folder / "tokenizer.json").exists()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["bos_token"]) == ("LlamaTokenizer", "<s>")
    ours, again = open_run(runs["linear"]).tokenizer, load_tokenizer(str(folder))
    for text in ("Q: What is  this?\n A:", "a red <s> fox", " ", "é ▁ 狐"):
        assert again(text).input_ids == ours(text).input_ids


def _official(world, folder, kind="mlp2x_gelu", tower=True, **changes):
    """A folder as the original code saves it: its own keys only, buffers among the weights, several .bin files."""
    run = world / f"run-{kind}"
    convert(run, folder, "llava", options=Options(compares_logits=False))
    for name in ("llava_ds.json", "parity.json", "manifest.json", "COMPLETE"):
        (folder / name).unlink(missing_ok=True)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    if not tower:
        weights = {name: value for name, value in weights.items() if "vision_tower" not in name}
    names = sorted(weights)
    parts = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    del config["llava_ds"]
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def official(world, runs, tmp_path_factory):
    """Such a folder, whose config a test may change."""
    folder = _official(world, tmp_path_factory.mktemp("official") / "llava")

    def changed(out, **changes):
        shutil.copytree(folder, out)
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | changes))
        return out

    return changed


def test_a_folder_of_the_original_code_is_read(official, runs, tmp_path):
    folder = official(tmp_path / "llava-official")
    assert detect_layout(folder) == "llava"
    with pytest.raises(ConfigError, match="--template, the conversation template"):
        convert(folder, tmp_path / "never", "transformers")
    done = convert(folder, tmp_path / "out", "transformers", options=Options(template="short"))
    assert done.comparisons[0].relative < 1e-5
    _same(read_transformers(tmp_path / "out").weights, open_run(runs["mlp2x_gelu"]).weights)
    weights = read_original_weights(folder)
    assert {name.split(".")[0] for name in weights} == {"llm", "projector"}


def test_a_folder_without_the_tower_takes_it_from_where_it_is_named_or_given(world, runs, exports, tmp_path):
    named = _official(world, tmp_path / "named", tower=False)
    assert read_original(named, "short").tower == open_run(runs["linear"]).tower
    shutil.rmtree(named / "vision_tower")
    name = "openai/clip-vit-large-patch14"
    config = json.loads((named / "config.json").read_text()) | {"mm_vision_tower": name}
    (named / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"--vision-tower .*which its config calls '{name}'"):
        convert(named, tmp_path / "never", "transformers", options=Options(template="short"))
    assert len(read_original_weights(named)) > 10  # a run has a tower of its own
    for kind in ("clip", "tower"):
        options = Options(template="short", vision_tower=str(exports["linear", kind]))
        convert(named, tmp_path / kind, "llava_ds", options=options)
        _same(read_transformers(tmp_path / kind).weights, open_run(runs["mlp2x_gelu"]).weights)


def test_a_tower_of_openai_needs_no_config(tmp_path):
    """Its heads are 64 wide and its activation is quick-GELU: the shapes of the weights say the rest."""
    write_llm(tmp_path / "llm")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    spec = _write_tower(tmp_path / "tower", 128, 2, "quick_gelu", mean, std, (30, 6))
    write_run(tmp_path, "run-linear")
    folder = _official(tmp_path, tmp_path / "llava", "linear", mm_vision_tower="openai/clip-vit-large-patch14")
    shutil.rmtree(folder / "vision_tower")
    model = read_original(folder, "v1")
    assert model.tower == spec
    assert model.tower_name == "openai/clip-vit-large-patch14"
    convert(folder, tmp_path / "llava-again", "llava", options=Options(template="v1"))
    assert not (tmp_path / "llava-again" / "vision_tower").exists()  # the code fetches it by its name
    again = json.loads((tmp_path / "llava-again" / "config.json").read_text())
    assert again["mm_vision_tower"] == "openai/clip-vit-large-patch14"


def test_a_tower_without_a_config_that_is_not_openais_is_asked_for(official, tmp_path):
    folder = official(tmp_path / "llava", mm_vision_tower="laion/CLIP-ViT-H-14")
    shutil.rmtree(folder / "vision_tower")
    with pytest.raises(ConfigError, match="--vision-tower"):
        read_original(folder, "v1")


@pytest.mark.parametrize(("name", "pretrained", "expected"), [
    ("ViT-L-14-336-quickgelu", "openai", "openai/clip-vit-large-patch14-336"),
    ("ViT-L-14-quickgelu", "openai", "openai/clip-vit-large-patch14"),
    ("ViT-L-14", "openai", None), ("ViT-L-14-quickgelu", "dfn2b", None), ("ViT-H-14-quickgelu", "openai", None),
])
def test_only_towers_of_openai_have_a_published_name(name, pretrained, expected):
    assert published_name(name, pretrained) == expected


@pytest.mark.parametrize(("changes", "message"), [
    ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu'"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type.*image_aspect"),
    ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
    ({"mm_projector_type": "linear"}, "mm_projector_type is linear, but its projector has 0.bias"),
    ({"hidden_size": 128}, "weights do not fit its config"),
    ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 1}, r"model.layers.1.input_layernorm.weight is unknown"),
])
def test_an_original_folder_with_settings_that_nothing_here_has_is_refused(official, tmp_path, changes, message):
    folder = official(tmp_path / "llava", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_original(folder, "v1")


@pytest.mark.parametrize(("rope", "legacy"), [
    ({"rope_type": "default", "rope_theta": 5e5}, None),
    ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, {"type": "linear", "factor": 2.0}),
    ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, {"type": "dynamic", "factor": 4.0}),
])
def test_rotary_settings_are_written_as_the_old_transformers_reads_them(runs, tmp_path, rope, legacy):
    model = open_run(runs["linear"])
    text = dict(AutoConfig.for_model(**model.text_config | {"rope_parameters": rope}).to_dict())
    config = original_config(replace(model, text_config=text), 355, None)
    assert (config["rope_theta"], config["rope_scaling"]) == (rope["rope_theta"], legacy)
    assert "rope_parameters" not in config
    assert text_config_of(config)["rope_parameters"] == rope


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "qwen2"}, "its LLM is of the type qwen2"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}, "mlp_bias": True}, "rope_type=llama3.*mlp_bias"),
    ({"head_dim": 24}, "head_dim=24; only 16"),
])
def test_an_llm_that_the_original_code_lacks_is_refused(runs, tmp_path, changes, message):
    model = open_run(runs["linear"])
    with pytest.raises(ConfigError, match=message):
        write_original(replace(model, text_config=model.text_config | changes), tmp_path, 1 << 30)
    assert not list(tmp_path.iterdir())


def test_a_mistral_has_its_own_class(tmp_path):
    write_world(tmp_path)
    config = MistralConfig(
        vocab_size=355, hidden_size=LLM_WIDTH, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, sliding_window=77,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "llm")
    run = write_run(tmp_path)
    convert(run, tmp_path / "llava-mistral", "llava")
    written = json.loads((tmp_path / "llava-mistral" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("llava_mistral", ["LlavaMistralForCausalLM"])
    model = read_original(tmp_path / "llava-mistral")
    assert (model.text_config["model_type"], model.text_config["sliding_window"]) == ("mistral", 77)
    _same(model.weights, open_run(run).weights)


@pytest.mark.parametrize(("given", "said", "block"), [(None, -2, -2), (-1, -2, -1), (None, 2, -2), (3, -2, -1)])
def test_layers_are_counted_as_the_original_code_counts_them(official, tmp_path, given, said, block):
    """Of three blocks; its layer 0 is what goes into the first one."""
    folder = official(tmp_path / "llava", mm_vision_select_layer=said)
    assert read_original(folder, "v1", select_layer=given).select_layer == block


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_the_tower_has_not_is_refused_as_it_was_given(exports, tmp_path, layer):
    with pytest.raises(ConfigError, match=f"of layer {layer}, but the tower has 3 blocks"):
        convert(exports["linear", "tower"], tmp_path / "never", "clip", options=Options(select_layer=layer))


# The projector's file.


@pytest.mark.parametrize("prefix", ["", "mm_projector.", "model.mm_projector.", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize("kind", KINDS)
def test_an_official_projector_file_is_read_with_any_prefix(exports, tmp_path, prefix, kind):
    expected = read_projector_file(exports[kind, "projector"] / "mm_projector.bin")
    torch.save({prefix + name: value.whole() for name, value in expected.items()}, tmp_path / "x.bin")
    _same(read_projector_file(tmp_path / "x.bin"), expected)


def test_our_projector_file_is_what_the_original_code_loads(exports):
    file = exports["mlp2x_gelu", "projector"] / "mm_projector.bin"
    state = torch.load(file, weights_only=True)
    assert list(state) == [f"model.mm_projector.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    assert file.stat().st_size < 4 * sum(value.numel() for value in state.values()) + 5000
    config = json.loads((file.parent / "config.json").read_text())
    assert (config["mm_projector_type"], config["mm_hidden_size"]) == ("mlp2x_gelu", VISION_WIDTH)


def test_word_embeddings_beside_a_projector_are_left_and_noted(exports, tmp_path):
    state = torch.load(exports["linear", "projector"] / "mm_projector.bin", weights_only=True)
    torch.save(state | {"model.embed_tokens.weight": torch.zeros(9, 4)}, tmp_path / "mm_projector.bin")
    done = convert(tmp_path / "mm_projector.bin", tmp_path / "out", "projector")
    assert "word embeddings" in done.notes[0]
    _same(read_projector_file(tmp_path / "out" / "mm_projector.bin"),
          read_projector_file(exports["linear", "projector"] / "mm_projector.bin"))


@pytest.mark.parametrize(("state", "message"), [
    ({"model.mm_projector.0.weight": torch.zeros(8, 4)}, "It has model.mm_projector.0.weight"),
    ({"lm_head.weight": torch.zeros(8, 4)}, "It has lm_head.weight"),
    ({}, "It has nothing"),
    ({f"mm_projector.{n}.{k}": torch.zeros(3) for n in (0, 2, 4) for k in ("weight", "bias")}, "mm_projector.4.bias"),
    ({"a.mm_projector.weight": torch.zeros(8, 4), "b.mm_projector.weight": torch.zeros(8, 4),
      "a.mm_projector.bias": torch.zeros(8)}, "no projector that is known"),
    ({"weight": torch.zeros(8, 4), "bias": torch.zeros(7)}, r"bias is \(7,\), the others need \(8,\)"),
    ({"weight": torch.zeros(0), "bias": torch.zeros(0)}, "is empty"),
    ({"weight": torch.zeros(8), "bias": torch.zeros(8)}, "not matrices"),
    ({"0.weight": torch.zeros(8, 4), "0.bias": torch.zeros(8), "2.weight": torch.zeros(8, 4), "2.bias":
      torch.zeros(8)}, r"2.weight is \(8, 4\), the others need \(8, 8\)"),
])
def test_what_is_no_projector_is_refused_with_what_it_is(tmp_path, state, message):
    torch.save(state, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=message):
        read_projector_file(tmp_path / "mm_projector.bin")


def test_nothing_in_a_projector_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"mm_projector.weight": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="nothing else in it is ever executed"):
        read_projector_file(tmp_path / "mm_projector.bin")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"hello", b"", b"PK\x03\x04", b"\x80\x02h\x05."])
def test_what_is_no_file_of_tensors_is_refused_by_name(tmp_path, content):
    (tmp_path / "mm_projector.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="mm_projector.bin cannot be read"):
        read_projector_file(tmp_path / "mm_projector.bin")


# CLIP.


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(("size", "patch"), [(42, 14), (35, 7), (50, 10)])
def test_a_tower_has_the_features_that_transformers_computes(tmp_path, act, size, patch):
    spec = TowerSpec(size, patch, 48, 3, 3, 100, 1e-5, act, (0.4,) * 3, (0.3,) * 3, "bicubic")
    torch.manual_seed(size)
    tower = build_tower_from_spec(spec, -1)
    with torch.no_grad():  # fresh biases and norms are 0 and 1: swapped ones would not show
        for value in tower.visual.parameters():
            value.add_(0.1 * torch.randn_like(value))
    stored = StoredTower(spec, {name: in_memory(value) for name, value in tower.visual.state_dict().items()})
    write_clip(stored, tmp_path, torch.float32)
    theirs = CLIPVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        states = theirs(pixels, output_hidden_states=True).hidden_states
        for select_layer in (-1, -2, -3):
            shorter = build_tower_from_spec(spec, select_layer)
            shorter.visual.load_state_dict(tower.visual.state_dict())
            found = shorter(pixels)
            assert found.abs().max() > 1
            # fp32: the largest difference measured is 4e-6 of values up to 8, as attention and GELU sum in another
            # order. quick-GELU taken for GELU is off by 1e-2.
            torch.testing.assert_close(found, states[select_layer][:, 1:], rtol=0, atol=2e-5)
    again = read_clip(tmp_path)
    assert again.spec == spec
    _same(again.weights, stored.weights)


def test_an_open_clip_model_becomes_a_clip_folder(tmp_path):
    """By its name, with a file of its weights."""
    name, whole = write_open_clip(tmp_path)
    options = Options(vision_pretrained=str(tmp_path / "clip.pt"))
    done = convert(Path(name), tmp_path / "clip", "clip", "tower", options)
    assert done.comparisons[0].relative < 1e-5
    expected = {key: in_memory(value) for key, value in whole.visual.state_dict().items() if key != "proj"}
    _same(read_clip(tmp_path / "clip").weights, expected)
    with pytest.raises(ConfigError, match="say whose weights it has"):
        convert(Path(name), tmp_path / "never", "clip", "tower")


def test_a_clip_with_its_text_model_gives_its_vision_model(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
            "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="neither preprocessor_config.json nor"):
        read_clip(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "clip")
    assert detect_layout(tmp_path / "clip") == "clip"
    convert(tmp_path / "clip", tmp_path / "tower", "tower")
    tower = build_tower_from_spec(read_tower_spec(tmp_path / "tower"), -1)
    tower.visual.load_state_dict(load_file(tmp_path / "tower" / "model.safetensors"))
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        torch.testing.assert_close(tower(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("file", "changes", "message"), [
    ("config.json", {"hidden_act": "relu", "num_channels": 1}, "hidden_act is 'relu'.*num_channels is 1"),
    ("config.json", {"model_type": "siglip_vision_model"}, "siglip_vision_model"),
    ("config.json", {"num_hidden_layers": 4}, "transformer.resblocks.3.ln_1.weight is missing"),
    ("config.json", {"intermediate_size": 65}, r"mlp.c_fc.weight is \(64, 32\), the config says \(65, 32\)"),
    ("preprocessor_config.json", {"resample": 0}, "resample is 0"),
    ("preprocessor_config.json", {"crop_size": {"height": 28, "width": 28}}, "crop_size is 28, not 42"),
])
def test_a_tower_of_another_kind_or_with_other_weights_is_refused(exports, tmp_path, file, changes, message):
    shutil.copytree(exports["linear", "clip"], tmp_path / "clip")
    raw = json.loads((tmp_path / "clip" / file).read_text())
    (tmp_path / "clip" / file).write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=message):
        read_tower(str(tmp_path / "clip"))


# Requests.


def test_every_possible_pair_is_listed_once(exports):
    assert set(POSSIBLE) == set(SOURCES)
    assert {target for targets in POSSIBLE.values() for target in targets} == set(TARGETS)


@pytest.mark.parametrize(("source", "target", "options", "message"), [
    ("clip", "transformers", Options(), "from clip to transformers is no conversion. Possible are"),
    ("projector", "tower", Options(), "projector: to llava_ds, transformers, llava, gguf, projector"),
    ("projector", "transformers", Options(template="v1"), "--llm, --vision-tower, too"),
    ("projector", "projector", Options(llm=Path("x")), "--llm says nothing about"),
    ("llava_ds", "transformers", Options(template="v1", max_shard_bytes=9), "--template says nothing about"),
    ("llava_ds", "llava", Options(projector_act="relu"), "--projector-act says nothing about"),
    ("llava_ds", "gguf", Options(projector_act="relu"), "--projector-act says nothing about"),
    ("llava", "transformers", Options(vision_pretrained="openai"), "needs --vision-tower"),
])
def test_what_cannot_be_is_one_error(exports, tmp_path, source, target, options, message):
    folder = exports["linear", source]
    with pytest.raises(ConfigError, match=message):
        convert(folder, tmp_path / "never", target, source, options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("held", "asked"), [
    ("llava", "llava_ds"), ("llava", "transformers"), ("llava_ds", "llava"), ("clip", "tower"), ("tower", "clip"),
])
def test_another_layout_than_the_folders_is_refused(exports, tmp_path, held, asked):
    with pytest.raises(ConfigError, match=f"is of the layout {held}, not {asked}; leave --from out"):
        convert(exports["linear", held], tmp_path / "never", "clip", asked)


def test_a_layout_that_the_folder_has_as_well_may_be_asked_for(runs, exports, tmp_path):
    """A merged folder is transformers', a run is not; the original code may keep a projector beside the model."""
    done = convert(exports["linear", "llava_ds"], tmp_path / "clip", "clip", "transformers")
    assert done.source_layout == "transformers"
    with pytest.raises(ConfigError, match="is of the layout llava_ds, not transformers"):
        convert(runs["linear"], tmp_path / "never", "clip", "transformers")
    shutil.copytree(exports["linear", "llava"], tmp_path / "llava")
    shutil.copy(exports["mlp2x_gelu", "projector"] / "mm_projector.bin", tmp_path / "llava")
    convert(tmp_path / "llava", tmp_path / "whole", "projector")
    convert(tmp_path / "llava", tmp_path / "alone", "projector", "projector")
    for folder, kind in (("whole", "linear"), ("alone", "mlp2x_gelu")):
        _same(read_projector_file(tmp_path / folder / "mm_projector.bin"),
              read_projector_file(exports[kind, "projector"] / "mm_projector.bin"))


def test_what_is_no_checkpoint_is_told_what_it_lacks(exports, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(exports["linear", "llava"], folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has the config.json of the layout original, but no weights"):
        detect_layout(folder)
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json cannot be read: it holds a list, not settings by name"):
        detect_layout(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has weights, but no config.json"):
        detect_layout(folder)
    with pytest.raises(CheckpointError, match="(?s)no such folder; give.*--from tower an open_clip name") as failure:
        detect_layout(tmp_path / "ViT-L-14")
    assert str(failure.value).count("llava-hf") == 1


@pytest.mark.parametrize("target", ["transformers", "llava", "gguf"])
def test_a_disk_without_room_is_noticed_before_anything_is_written(runs, tmp_path, monkeypatch, target):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12345))
    with pytest.raises(CheckpointError, match=rf"{tmp_path} has 12345 bytes free, \d+ are needed"):
        convert(runs["linear"], tmp_path / "never", target)
    assert not list(tmp_path.iterdir())


def test_a_template_that_ends_with_a_text_is_noted(world, tmp_path):
    """generate does not stop at ``###`` by itself."""
    run = write_run(world, "run-v0", data__template="v0")
    done = convert(run, tmp_path / "out", "transformers", options=Options(compares_logits=False))
    assert "give stop_strings=['###'] to generate" in done.notes[0]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("0.5mb", 500_000), ("1KB", 1000), ("2TB", 2 * 10**12)])
def test_sizes_are_decimal(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-3GB", "nanGB", "infGB", "0GB", "", "5 GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=f"'{text}' is not a size; write it as 5GB"):
        parse_size(text)


def test_parts_that_do_not_fit_are_refused_with_all_widths(world, exports, tmp_path):
    _write_tower(tmp_path / "tower", 48, 3)
    options = Options(llm=world / "llm", vision_tower=str(tmp_path / "tower"), template="v1")
    with pytest.raises(ConfigError, match="goes from 32 to 64, but the tower is 48 and the LLM 64 wide"):
        convert(exports["linear", "projector"], tmp_path / "never", "transformers", options=options)
    options = replace(options, vision_tower=str(world / "nowhere"))
    with pytest.raises(ConfigError, match="is no folder here"):
        convert(exports["linear", "projector"], tmp_path / "never", "transformers", options=options)
    assert not (tmp_path / "never").exists()


def test_an_existing_folder_is_never_touched(runs, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(runs["linear"], tmp_path / "there", "transformers")
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("target", ["llava_ds", "llava", "tower"])
def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(runs, tmp_path, monkeypatch, target):
    """A LayerNorm is written one per cent too large: names, shapes and hashes are right."""
    split, write = writer.split_shards, writer.write_safetensors
    num_changed = 0

    def change(tensors):
        nonlocal num_changed
        name = "transformer.resblocks.0.ln_1.weight" if target == "tower" else "model.norm.weight"
        num_changed += sum(key.endswith(name) for key, _ in tensors)
        return [(key, in_memory(value.whole() * 1.01) if key.endswith(name) else value) for key, value in tensors]

    monkeypatch.setattr(writer, "split_shards", lambda tensors, size: split(change(tensors), size))
    monkeypatch.setattr(clip_module, "write_safetensors", lambda path, tensors, tell, **options: write(
        path, change(tensors) if target == "tower" else tensors, tell, **options))
    with pytest.raises(CheckpointError, match="does not compute what its source does") as caught:
        convert(runs["linear"], tmp_path / "out", target)
    assert re.search(r"largest difference 0\.\d+ of \d", str(caught.value))
    assert num_changed == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "target"), [(torch.bfloat16, "llava_ds"), (torch.float16, "llava")])
def test_another_precision_rounds_once_and_still_agrees(runs, tmp_path, dtype, target):
    done = convert(runs["mlp2x_gelu"], tmp_path / "llava", target, options=Options(dtype=dtype))
    assert {value.dtype for value in load_file(tmp_path / "llava" / "model.safetensors").values()} == {dtype}
    # The rounded weights are compared with the rounded weights, computed in fp32.
    assert all(item.dtype == "float32" and item.relative < 1e-5 for item in done.comparisons)
    expected = open_run(runs["mlp2x_gelu"]).weights
    _same(_read(target, tmp_path / "llava").weights, {name: value.cast(dtype) for name, value in expected.items()})


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "linear"), (torch.float16, "mlp2x_gelu")])
def test_where_memory_is_short_16_bits_are_compared_as_they_are(runs, tmp_path, monkeypatch, dtype, kind):
    """Two implementations in 16 bits; the bound is the one that a user's export has to keep."""
    monkeypatch.setattr(parity, "choose_dtype", lambda model: model.dtype)
    done = convert(runs[kind], tmp_path / kind, "transformers", options=Options(dtype=dtype))
    assert done.comparisons[0].dtype == str(dtype).removeprefix("torch.")
    assert done.comparisons[0].relative < parity.TOLERANCES[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_files_appear_with_a_word_about_their_logits(runs, tmp_path, kind):
    done = convert(runs[kind], tmp_path / "out", "gguf", options=Options(class_token="first"))
    assert {"text.gguf", "mmproj.gguf", "parity.json"} < set(done.files)
    assert done.notes == [
        "every tensor, read through the package gguf, equals its source; llama.cpp itself was not run",
        "logits were not compared: nothing here computes from GGUF files",
    ]
    assert find_damage(tmp_path / "out") == []


def test_without_memory_the_comparison_says_so_or_is_skipped(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_available_bytes", lambda: 1000.0)
    with pytest.raises(ConfigError, match="or --no-logits"):
        convert(runs["linear"], tmp_path / "out", "transformers")
    convert(runs["linear"], tmp_path / "out", "transformers", options=Options(compares_logits=False))
    written = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert written["comparisons"] == []
    assert written["notes"] == ["logits were not compared: --no-logits"]
    size = sum(value.numel for value in open_run(runs["linear"]).weights.values())
    monkeypatch.setattr(parity, "_available_bytes", lambda: 3.9 * size)
    assert parity.choose_dtype(replace(open_run(runs["linear"]), dtype=torch.bfloat16)) is torch.bfloat16


def test_a_blind_model_is_compared_with_its_pictures_and_noted(world, tmp_path):
    run = write_run(world, "run-blind", model__zero_features=True)
    for target in ("transformers", "llava"):
        done = convert(run, tmp_path / f"llava-{target}", target)
        assert any("blind" in note for note in done.notes)
        assert done.comparisons[0].relative < 1e-5


def test_nan_never_passes():
    nan = torch.tensor([1.0, float("nan")])
    assert not parity.compare("x", "logits", nan, nan, torch.float32).passes
    assert parity.compare("x", "logits", torch.zeros(2), torch.zeros(2), torch.float32).passes
    assert not parity.compare("x", "logits", torch.zeros(2), torch.ones(2), torch.float32).passes
    with pytest.raises(CheckpointError, match=r"\(3,\) of the export, \(2,\) of the source"):
        parity.compare("x", "logits", torch.zeros(2), torch.zeros(3), torch.float32)


def test_large_models_are_written_in_shards(runs, tmp_path):
    for target in ("transformers", "llava"):
        out = tmp_path / f"llava-{target}"
        done = convert(runs["linear"], out, target, options=Options(max_shard_bytes=100_000))
        shards = [name for name in done.files if re.match(r"model-\d{5}-of-\d{5}", name)]
        assert len(shards) > 3
        _same(_read(target, out).weights, open_run(runs["linear"]).weights)


def _invoke(*arguments):
    return invoke("convert", *arguments)


def test_the_command_says_what_it_wrote(runs, exports, tmp_path):
    done = _invoke("--to", "llava", "--max-shard-size", "0.2MB", "--dtype", "bf16", runs["linear"], tmp_path / "llava")
    assert done.exit_code == 0, done.output
    assert "logits through llava_ds in float32: largest difference 0 of" in done.stdout
    assert "note: the original code loads the tower from" in done.stdout
    assert f"{tmp_path / 'llava'}: llava, from llava_ds (COMPLETE, config.json" in done.stdout
    assert "model-00002-of-0000" in done.stdout
    wrong = _invoke("--to", "gguf", exports["linear", "clip"], tmp_path / "no")
    assert wrong.exit_code == 1
    assert "Error: ConfigError: from clip to gguf is no conversion" in wrong.output
    size = _invoke("--to", "llava", "--max-shard-size", "5", runs["linear"], tmp_path / "no")
    assert size.exit_code == 2
    assert "'5' is not a size; write it as 5GB" in size.output
    assert not (tmp_path / "no").exists()
