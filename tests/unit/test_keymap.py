"""Names and shapes go to other layouts and come back as they were."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_ds.checkpoint.keymap import (
    PROJECTOR_ACTS,
    choose_projector_export,
    list_some,
    llava_hf_names,
    projector_from_hf,
    projector_to_hf,
    recognise_projector,
    strip_prefix,
    tower_from_clip,
    tower_to_clip,
)
from llava_ds.checkpoint.lazy import in_memory
from llava_ds.errors import CheckpointError, ConfigError
from llava_ds.models.projector import build_projector
from llava_ds.models.vision_tower import TowerSpec, build_tower_from_spec

ACTS = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "linear": lambda x: x}


def _lazy(tensors):
    return {name: in_memory(value) for name, value in tensors.items()}


def _tower_weights(layers=3):
    spec = TowerSpec(35, 7, 24, layers, 3, 40, 1e-5, "gelu", (0.5,) * 3, (0.5,) * 3, "bicubic")
    return _lazy(build_tower_from_spec(spec, -2).visual.state_dict())


def _projector(kind, vision_width, width, dtype=torch.float32):
    module = build_projector(kind, vision_width, width, seed=3).to(dtype)
    return module, _lazy(module.state_dict())


def _theirs(hf, act, features):
    linear = torch.nn.functional.linear
    first = linear(features, hf["linear_1.weight"].whole(), hf["linear_1.bias"].whole())
    return linear(ACTS[act](first), hf["linear_2.weight"].whole(), hf["linear_2.bias"].whole())


def test_a_tower_comes_back_from_clip_names_bit_by_bit():
    ours = _tower_weights()
    again = tower_from_clip(tower_to_clip(ours))
    assert again.keys() == ours.keys()
    assert len(again) == 7 + 3 * 12
    for name, value in ours.items():
        assert again[name].shape == value.shape
        assert torch.equal(again[name].whole(), value.whole()), name


def test_the_projection_to_the_joint_embedding_is_left():
    ours = _tower_weights()
    assert tower_to_clip(ours | {"proj": in_memory(torch.zeros(24, 8))}).keys() == tower_to_clip(ours).keys()


@pytest.mark.parametrize("name", ["attn_pool.query", "transformer.resblocks.0.ls_1.gamma"])
def test_a_tower_of_another_kind_is_refused(name):
    with pytest.raises(CheckpointError, match=f"{name} has no place"):
        tower_to_clip(_tower_weights() | {name: in_memory(torch.zeros(3))})


@pytest.mark.parametrize("name", ["encoder.layers.1.self_attn.k_proj.bias", "post_layernorm.weight"])
def test_a_clip_that_is_not_whole_is_refused(name):
    clip = tower_to_clip(_tower_weights())
    del clip[name]
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        tower_from_clip(clip)


def test_a_clip_without_its_middle_is_refused():
    clip = {name: value for name, value in tower_to_clip(_tower_weights()).items() if ".layers.1." not in name}
    with pytest.raises(CheckpointError, match="without a place here: encoder.layers.2"):
        tower_from_clip(clip)


def test_the_buffer_of_old_clip_files_is_left():
    clip = tower_to_clip(_tower_weights()) | {"embeddings.position_ids": in_memory(torch.arange(26)[None])}
    assert tower_from_clip(clip).keys() == _tower_weights().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "act", "export"),
    [("mlp2x_gelu", "auto", "mlp"), ("mlp2x_gelu", "gelu", "mlp"), ("linear", "auto", "relu_pair"),
     ("linear", "relu", "relu_pair"), ("linear", "gelu", "gelu_pair"), ("linear", "linear", "identity")],
)
def test_a_projector_comes_back_bit_by_bit(kind, act, export, dtype):
    _, ours = _projector(kind, 10, 23, dtype)
    assert choose_projector_export(kind, 10, 23, act) == export
    hf = projector_to_hf(ours, export)
    assert {name: value.shape for name, value in hf.items()} == {
        "linear_1.weight": (23, 10), "linear_1.bias": (23,), "linear_2.weight": (23, 23), "linear_2.bias": (23,),
    }
    assert all(value.dtype is dtype for value in hf.values())
    assert recognise_projector(hf, PROJECTOR_ACTS[export]) == export
    again = projector_from_hf(hf, export)
    assert again.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(again[name].whole(), value.whole()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "linear"])
def test_a_linear_map_in_two_layers_is_exact(act, dtype):
    """Whole numbers: no sum is rounded, in whichever order it is taken."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randint(-3, 4, (23, 10), generator=generator).to(dtype)
    bias, features = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((23,), (7, 10)))
    hf = projector_to_hf(_lazy({"weight": weight, "bias": bias}), choose_projector_export("linear", 10, 23, act))
    expected = torch.nn.functional.linear(features, weight, bias)
    assert expected.abs().max() > 10
    assert torch.equal(_theirs(hf, act, features), expected)


def test_gelu_in_a_pair_is_the_map_up_to_rounding():
    """gelu(v) - gelu(-v) = v; in fp64 what is left is rounding, 1e-16 of values up to 10."""
    module, ours = _projector("linear", 10, 20, torch.float64)
    features = 3 * torch.randn(50, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    difference = _theirs(projector_to_hf(ours, "gelu_pair"), "gelu", features) - module(features)
    assert difference.abs().max() < 1e-13


@pytest.mark.parametrize("width", [19, 9])
def test_a_narrow_llm_gets_the_identity_and_refuses_pairs(width):
    assert choose_projector_export("linear", 10, width) == "identity"
    for act in ("relu", "gelu"):
        with pytest.raises(ConfigError, match=f"they are {width} and 10 wide"):
            choose_projector_export("linear", 10, width, act)
    _, ours = _projector("linear", 10, width)
    hf = projector_to_hf(ours, "identity")
    assert recognise_projector(hf, "linear") == "identity"
    assert torch.equal(projector_from_hf(hf, "identity")["weight"].whole(), ours["weight"].whole())


def test_another_activation_of_a_trained_mlp_is_refused():
    with pytest.raises(ConfigError, match="whose own is gelu"):
        choose_projector_export("mlp2x_gelu", 10, 23, "relu")


@pytest.mark.parametrize("name", ["linear_1.bias", "linear_2.weight", "linear_2.bias"])
def test_what_is_nearly_a_pair_is_not_taken_for_one(name):
    _, ours = _projector("linear", 10, 23)
    hf = projector_to_hf(ours, "gelu_pair")
    changed = hf[name].whole().clone()
    changed.view(-1)[-1] += 1
    found = recognise_projector(hf | {name: in_memory(changed)}, "gelu")
    assert found == ("gelu_pair" if name == "linear_2.bias" else "mlp")  # the last bias is the map's own


@pytest.mark.parametrize("act", ["relu", "linear", "silu"])
def test_a_trained_mlp_with_another_activation_is_refused(act):
    _, ours = _projector("mlp2x_gelu", 10, 23)
    with pytest.raises(CheckpointError, match=f"activation '{act}'"):
        recognise_projector(projector_to_hf(ours, "mlp"), act)


def test_a_projector_that_is_not_whole_or_has_more_is_refused():
    hf = projector_to_hf(_projector("mlp2x_gelu", 10, 23)[1], "mlp")
    with pytest.raises(CheckpointError, match="lacks linear_1.bias, linear_2.bias"):
        recognise_projector({name: value for name, value in hf.items() if "bias" not in name}, "gelu")
    with pytest.raises(CheckpointError, match="without a place here: linear_3.weight"):
        projector_from_hf(hf | {"linear_3.weight": hf["linear_1.weight"]}, "mlp")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LLaVA as transformers saves it, and its weights under the names in memory."""
    folder = tmp_path_factory.mktemp("saved")
    vision = CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
                              image_size=35, patch_size=7)
    text = LlamaConfig(vocab_size=50, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))
    model.save_pretrained(folder)
    return folder, model.state_dict()


def test_all_layouts_of_transformers_have_the_same_names(saved):
    folder, in_memory_state = saved
    written = load_file(folder / "model.safetensors")
    with_vision_model = {name.replace("model.vision_tower.", "model.vision_tower.vision_model."): value
                         for name, value in in_memory_state.items()}
    layouts = [_lazy(weights) for weights in (written, in_memory_state, with_vision_model)]
    named = [llava_hf_names(layout) for layout in layouts]
    named.append(llava_hf_names(named[0]))  # llava-hf's own
    assert len({frozenset(layout) for layout in (*layouts, named[0])}) == 4  # the four do differ
    assert {name.split(".")[0] for name in named[0]} == {"vision_tower", "language_model", "multi_modal_projector"}
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} < named[0].keys()
    assert "vision_tower.vision_model.pre_layrnorm.bias" in named[0]
    for names in named[1:]:
        assert names.keys() == named[0].keys()
        assert all(torch.equal(names[name].whole(), named[0][name].whole()) for name in names)


def test_transformers_reads_the_names_of_llava_hf(saved, tmp_path):
    folder, expected = saved
    names = llava_hf_names(_lazy(load_file(folder / "model.safetensors")))
    tower = strip_prefix(names, "vision_tower.vision_model.")
    assert tower_to_clip(tower_from_clip(tower)).keys() == tower.keys()
    save_file({name: value.whole().contiguous() for name, value in names.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    found = theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == len(expected)


def test_long_lists_are_cut():
    assert list_some("abc") == "a, b, c"
    assert list_some("abcdefghij", most=2) == "a, b and 8 more"
