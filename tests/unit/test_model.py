"""The model over packed and padded batches: same gradients, no leak between samples, flash attention's arguments."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_path

from llava_ds.config import ModelConfig
from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example
from llava_ds.data.images import ImageTransform
from llava_ds.data.sources.llava_json import open_llava_json
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.models.build import build_model, load_tokenizer, resolve_attention
from llava_ds.models.freezing import apply_freezing
from tests.helpers.tiny import IMAGE_SIZE, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def _model(world: Path, attention: str = "sdpa"):
    config = ModelConfig(
        vision_tower=str(world / "tower"), llm=str(world / "llm"), projector="mlp2x_gelu"
    )
    model = build_model(config, attention, torch.float32, seed=3)
    apply_freezing(model, ["projector", "llm"])
    return model


def _examples(world: Path, model, count: int = 6) -> list[Example]:
    samples = list(open_llava_json(world / "data" / "train.json", world / "data"))
    text = TextPipeline(load_tokenizer(str(world / "llm")), "short", "random", 9, 256, seed=0)
    transform = ImageTransform.for_tower(model.vision_tower.spec, "square")
    examples = []
    for sample in samples[:count]:
        images = [transform(image) for image in sample.images]
        examples.append(Example(text.encode(sample, 0), images))
    assert any(not example.images for example in examples)
    return examples


def _collate(examples, packing: str):
    return Collator(packing, torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE), features=False)(examples)


def _gradients(model, batch):
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_packed_and_padded_give_the_same_loss_and_gradients(world):
    model = _model(world)
    examples = _examples(world, model)
    packed, padded = _collate(examples, "packed"), _collate(examples, "padded")
    assert packed.num_supervised == padded.num_supervised > 20
    packed_loss, packed_grads = _gradients(model, packed)
    padded_loss, padded_grads = _gradients(model, padded)
    # fp32 sums in another order: a few units in the last place of sums of about 100 terms.
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert len(packed_grads) > 10
    for name, gradient in packed_grads.items():
        torch.testing.assert_close(gradient, padded_grads[name], rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_no_token_sees_another_sample(world, packing):
    model = _model(world).eval()
    examples = _examples(world, model)
    changed = 2
    ids = examples[changed].encoded.input_ids
    other = tuple(3 + (token + 1) % 100 if token > 2 else token for token in ids)
    swapped = list(examples)
    swapped[changed] = replace(examples[changed], encoded=replace(examples[changed].encoded, input_ids=other))
    swapped[changed] = replace(swapped[changed], images=[image.flip(-1) for image in examples[changed].images])
    lengths = [len(example.encoded.input_ids) for example in examples]
    with torch.no_grad():
        before, after = (_all_logits(model, _collate(list_, packing)) for list_ in (examples, swapped))
    num_checked = 0
    for row, length in enumerate(lengths):
        if packing == "packed":
            start = sum(lengths[:row])
            old, new = before[0, start : start + length], after[0, start : start + length]
        else:
            old, new = before[row, :length], after[row, :length]
        if row == changed:
            assert not torch.equal(old, new)
        else:
            assert torch.equal(old, new), row
            num_checked += 1
    assert num_checked == len(examples) - 1


def _all_logits(model, batch):
    rows, columns = batch.input_ids.shape
    return model.logits(replace(batch, loss_rows=torch.arange(rows * columns))).view(rows, columns, -1)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_head_runs_on_supervised_positions_only(world, packing):
    model = _model(world)
    batch = _collate(_examples(world, model), packing)
    seen = []
    model.llm.lm_head.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    model(batch)
    vocabulary = model.llm.config.vocab_size
    assert seen == [((1, batch.num_supervised, 64), (1, batch.num_supervised, vocabulary))]


def test_a_batch_without_images_gives_the_projector_a_gradient_of_zero(world):
    model = _model(world)
    examples = [example for example in _examples(world, model) if not example.images]
    _, gradients = _gradients(model, _collate(examples, "packed"))
    assert gradients["projector.0.weight"].abs().max() == 0
    assert gradients["llm.lm_head.weight"].abs().max() > 0


def test_an_empty_share_computes_a_loss_of_zero(world):
    model = _model(world)
    loss, gradients = _gradients(model, _collate([], "packed"))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_the_flash_attention_path_passes_the_sample_boundaries(world, monkeypatch):
    """transformers' whole flash-attention path runs; plain PyTorch stands in for flash_attn_varlen_func alone."""
    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # [T, heads, width]
        assert causal and dropout_p == 0 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        calls.append((cu_seqlens_q, max_seqlen_q, max_seqlen_k))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        bounds = cu_seqlens_q.tolist()
        pieces = [
            torch.nn.functional.scaled_dot_product_attention(
                q[:, a:b], k[:, a:b], v[:, a:b], is_causal=True, scale=softmax_scale
            )
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return torch.cat(pieces, 1).transpose(0, 1)

    def no_batched_call(*_, **__):
        raise AssertionError("a packed row must go through flash_attn_varlen_func")

    library = (no_batched_call, flash_attn_varlen_func, None, flash_path._pad_input, flash_path._unpad_input)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn",
                 "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash_path, name, None)  # set by the first call, and put back after the test
    monkeypatch.setattr(flash_path, "_lazy_imports", lambda *_, **__: library)

    model = _model(world)
    examples = _examples(world, model)
    batch = _collate(examples, "packed")
    expected, expected_gradients = _gradients(model, batch)
    model.llm.config._attn_implementation = "flash_attention_2"
    loss, gradients = _gradients(model, batch)
    assert len(calls) == 2  # one for each layer
    lengths = [len(example.encoded.input_ids) for example in examples]
    for boundaries, longest_q, longest_k in calls:
        assert boundaries.dtype == torch.int32
        assert boundaries.tolist() == torch.tensor([0, *lengths]).cumsum(0).tolist()
        assert longest_q == longest_k == max(lengths)
    # fp32, the same sums in another order.
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_flash_attention_by_name_is_refused_without_a_gpu():
    from llava_ds.errors import BackendUnavailableError

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        resolve_attention("flash_attention_2", torch.device("cpu"))
    assert resolve_attention("auto", torch.device("cpu")).name == "sdpa"


def test_the_tower_stops_at_the_selected_block(world):
    model = _model(world)
    ran = []
    for number, block in enumerate(model.vision_tower.visual.transformer.resblocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    features = model.patch_features(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert features.shape == (2, 9, 32)
    assert ran == [0, 1]  # of 3 blocks; select_layer is -2
