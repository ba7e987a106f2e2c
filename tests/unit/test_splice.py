"""The splice module against calling projector and embedding one by one, and whose weights it reads."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example
from llava_ds.models.build import checkpoint_activations
from llava_ds.models.llava import Llava
from llava_ds.models.projector import build_projector
from llava_ds.ops.row_plan import plan_rows
from llava_ds.schema import Batch, EncodedSample

VOCABULARY, WIDTH, VISION_WIDTH, NUM_PATCHES, PADDING = 23, 16, 6, 3, 4
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}


class Shifted(nn.Module):
    """As a LoRA layer does, adds something of its own to the rows of an embedding."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base, self.shift = base, nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.base(ids) + self.shift


def _llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "pad_token_id": None, **changes}))


def _hooked() -> LlamaForCausalLM:
    llm = _llama()
    llm.get_input_embeddings().register_forward_hook(lambda *args: args[-1] * 2)
    return llm


def _shifted() -> LlamaForCausalLM:
    llm = _llama()
    llm.set_input_embeddings(Shifted(llm.get_input_embeddings()))
    return llm


def _checkpointed() -> LlamaForCausalLM:
    llm = _llama()
    checkpoint_activations(llm)
    return llm


LLMS = {
    "plain": _llama,
    "padding row": lambda: _llama(pad_token_id=PADDING),
    "activation checkpointing": _checkpointed,
    "scaled": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, pad_token_id=PADDING)),
    "hooked": _hooked,
    "shifted": _shifted,
}
READS_TABLE = {"plain", "padding row", "activation checkpointing"}


def _model(llm: str = "plain", projector: str = "linear") -> Llava:
    torch.manual_seed(6)
    return Llava(nn.Identity(), build_projector(projector, VISION_WIDTH, WIDTH, seed=2), LLMS[llm]())


def _batch(num_images: int = 2) -> Batch:
    """A text, a sample that begins with an image, one that ends with it, ...; some of their tokens twice."""
    generator = torch.Generator().manual_seed(8)
    patches = (IMAGE_TOKEN_INDEX,) * NUM_PATCHES
    rows = [(5, PADDING, 5, 9, PADDING, 11, 5), (*patches, 9, 22), (5, 0, *patches)][: num_images + 1]
    examples = [
        Example(
            EncodedSample(str(number), ("x",) * (number > 0), ids, ids),
            [torch.randn(NUM_PATCHES, VISION_WIDTH, generator=generator)] * (number > 0),
        )
        for number, ids in enumerate(rows)
    ]
    return Collator("padded", torch.ones(NUM_PATCHES, VISION_WIDTH), features=True)(examples)


def _one_by_one(model: Llava, batch: Batch) -> torch.Tensor:
    """[B, S, D], with a search for the image tokens."""
    is_image = batch.input_ids == IMAGE_TOKEN_INDEX
    embeds = model.llm.get_input_embeddings()(batch.input_ids.clamp(min=0))
    patches = model.projector(batch.patch_features).flatten(0, 1)[: int(is_image.sum())]
    spliced = embeds.masked_scatter(is_image[..., None], patches)
    return spliced * batch.attention_mask[..., None]  # rows of padding are zero


def _gradients(model: Llava, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    probe = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(9))
    (embeds * probe).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("llm", LLMS)
def test_values_and_gradients_are_those_of_projector_and_embedding(llm, projector, num_images):
    model, batch = _model(llm, projector), _batch(num_images)
    embeds = model.inputs_embeds(batch.input_ids, batch.patch_features, batch.row_plan)
    expected = _one_by_one(model, batch)
    is_text = batch.input_ids != IMAGE_TOKEN_INDEX
    assert torch.equal(embeds[is_text], expected[is_text])
    # fp32 products of 6 or 16 terms and sums of 7 rows, in another order.
    torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-6)
    found, wanted = _gradients(model, embeds), _gradients(model, expected)
    assert len(found) >= 3 and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0 or (name.startswith("projector.") and not num_images), name
    if llm in ("padding row", "scaled"):
        assert found["llm.model.embed_tokens.weight"][PADDING].abs().max() == 0
    assert len(model.splice.external_parameters()) == (3 if llm in READS_TABLE else 2)


@pytest.mark.parametrize("llm", LLMS)
def test_a_frozen_table_gets_no_gradient(llm):
    model, batch = _model(llm), _batch()
    model.llm.requires_grad_(False)
    found = _gradients(model, model.inputs_embeds(batch.input_ids, batch.patch_features, batch.row_plan))
    assert sorted(found) == ["projector.bias", "projector.weight"]


@pytest.mark.parametrize(
    "change",
    [
        lambda e: setattr(e, "max_norm", 1.0),
        lambda e: setattr(e, "sparse", True),
        lambda e: setattr(e, "scale_grad_by_freq", True),
        lambda e: e.register_forward_hook(print),
        lambda e: e.register_forward_pre_hook(print),
        lambda e: e.register_full_backward_hook(print),
        lambda e: e.register_full_backward_pre_hook(print),
        lambda e: add_hook_to_module(e, ModelHook()),  # accelerate's way: a forward of the object
    ],
)
def test_an_embedding_that_does_more_than_look_up_is_called(change):
    model = _model()
    assert len(model.splice.external_parameters()) == 3
    change(model.llm.get_input_embeddings())
    assert len(model.splice.external_parameters()) == 2


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("llm", LLMS)
def test_nothing_waits_for_the_device(llm, projector):
    """A tensor on the meta device has no values: whatever asks for one, or searches, fails."""
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta").nonzero()
    with pytest.raises(RuntimeError):
        torch.ones((), device="meta").item()
    model, batch = _model(llm, projector).to("meta"), _batch().to(torch.device("meta"))
    embeds = model.inputs_embeds(batch.input_ids, batch.patch_features, batch.row_plan)
    assert embeds.shape == (3, 7, WIDTH)
    embeds.sum().backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())


def test_no_weight_has_a_second_name():
    model = _model()
    assert not [name for name in model.state_dict() if name.startswith("splice")]
    assert not list(model.splice.parameters()) and not list(model.splice.children())
    assert {"projector.weight", "projector.bias"} < model.state_dict().keys()


def _embeds(model: Llava, batch: Batch) -> torch.Tensor:
    return model.inputs_embeds(batch.input_ids, batch.patch_features, batch.row_plan).detach()


def test_a_copy_reads_its_own_weights():
    model, batch = _model(), _batch()
    before = _embeds(model, batch)
    copy = deepcopy(model)
    assert torch.equal(_embeds(copy, batch), before)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert _embeds(copy, batch).abs().max() == 0
    assert torch.equal(_embeds(model, batch), before)


def test_a_moved_and_a_resized_model_reads_what_it_has_now():
    model, batch = _model(), _batch()
    before = _embeds(model, batch)
    assert _embeds(model.double(), batch).dtype == torch.float64
    torch.testing.assert_close(_embeds(model, batch).float(), before, rtol=1e-5, atol=1e-6)
    model.llm.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    words = Collator("packed", torch.ones(NUM_PATCHES, VISION_WIDTH), features=True)(
        [Example(EncodedSample("new", (), (VOCABULARY, 3), (VOCABULARY, 3)), [])]
    )
    assert torch.equal(_embeds(model, words)[0], F.embedding(words.input_ids, model.llm.model.embed_tokens.weight)[0])


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_replaced_parts_are_the_ones_that_are_read(projector):
    model, batch = _model("plain", projector), _batch()
    model.projector = build_projector(projector, VISION_WIDTH, WIDTH, seed=3)
    model.llm = LLMS["plain"]()
    torch.testing.assert_close(_embeds(model, batch), _one_by_one(model, batch).detach(), rtol=1e-5, atol=1e-6)


class Doubled(nn.Linear):
    """A layer whose weight does not say what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["wrapped", "hooked"])
def test_a_last_layer_that_is_more_than_its_weight_is_refused(change):
    model, batch = _model(), _batch()
    if change == "wrapped":
        model.projector = Doubled(VISION_WIDTH, WIDTH)
    else:
        model.projector.register_forward_hook(print)
    with pytest.raises(TypeError, match="without hooks or wrappers"):
        _embeds(model, batch)


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_autocast_projects_in_the_dtype_of_the_weights(projector):
    model, batch = _model("plain", projector), _batch()
    before = _embeds(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        inside = _embeds(model, batch)
    assert inside.dtype == torch.float32
    if projector == "linear":
        assert torch.equal(inside, before)
    else:  # the first layer runs in bf16, which rounds by 0.4 %: values of about 1 move, by less than 0.03
        torch.testing.assert_close(inside, before, rtol=0, atol=0.03)
        assert not torch.equal(inside, before)


def test_images_that_are_not_the_plans_are_refused():
    model, batch = _model(), _batch()
    with pytest.raises(ValueError, match="6 image rows in the plan but 9 patches"):
        model.inputs_embeds(batch.input_ids, batch.patch_features[[0, 1, 1]], batch.row_plan)


def test_no_sample_at_all():
    model = _model()
    embeds = model.inputs_embeds(torch.empty(0, 4, dtype=torch.long), torch.ones(1, NUM_PATCHES, VISION_WIDTH),
                                 plan_rows(torch.empty(0, 4, dtype=torch.long)))
    assert embeds.shape == (0, 4, WIDTH)
