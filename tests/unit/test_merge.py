"""A merged folder loads in transformers and in llava_ds, with our logits."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_ds.checkpoint.layout import commit, list_steps, resolve_step, step_dir, write_safetensors_stream
from llava_ds.checkpoint.load import load_model
from llava_ds.checkpoint.merge import chat_template, merge
from llava_ds.config import load_recipe
from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.data.images import ImageTransform
from llava_ds.errors import CheckpointError
from llava_ds.inference.session import Sampling, load_session
from llava_ds.models.build import build_model
from llava_ds.schema import Turn
from llava_ds.text.encode import encode_prompt
from llava_ds.text.templates import get_template
from tests.helpers.tiny import write_recipe, write_world

# fp32; the two implementations sum in another order. Logits are of size 1.
TOLERANCE = 1e-5


def _write_run(world, projector: str, name: str):
    """A run folder as training leaves it, with weights of its own."""
    config = load_recipe(str(write_recipe(world, model__projector=projector)))
    model = build_model(config.model, "sdpa", torch.float32, seed=21)
    step = step_dir(world / name, 4)
    step.mkdir(parents=True)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("vision_tower")}
    save_file(trained, step / "trainable.safetensors")
    (step / "run.json").write_text(json.dumps({"config": config.model_dump()}))
    commit(step)
    return world / name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("merge"))


@pytest.mark.parametrize(("projector", "export"), [("linear", "relu_pair"), ("mlp2x_gelu", "mlp")])
def test_logits_equal_ours(world, projector, export):
    run = _write_run(world, projector, f"run-{projector}")
    out = world / f"merged-{projector}"
    assert merge(run, out) == export
    ours, again = load_model(run), load_model(out)
    theirs = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    transform = ImageTransform.for_tower(ours.model.vision_tower.spec, "square")
    pixels = transform(world / "data" / "0.png")[None]
    prompt = encode_prompt([Turn("user", "<image>\nWhat is this?")], ours.tokenizer, get_template("short"), 9)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = [_our_logits(loaded.model, ids, pixels) for loaded in (ours, again)]
        image_id = theirs.config.image_token_id
        hf_ids = torch.where(ids == IMAGE_TOKEN_INDEX, image_id, ids)
        hf = theirs(input_ids=hf_ids, pixel_values=pixels).logits
    vocab = logits[0].shape[-1]
    assert logits[0].abs().max() > 0.1
    torch.testing.assert_close(logits[1][..., :vocab], logits[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(hf[..., :vocab], logits[0], rtol=0, atol=TOLERANCE)


def _our_logits(model, ids, pixels):
    rows = (ids.flatten() == IMAGE_TOKEN_INDEX).nonzero().flatten()
    embeds = model.inputs_embeds(ids, model.patch_features(pixels), rows)
    return model.llm(inputs_embeds=embeds).logits


def test_the_processor_writes_the_same_prompt(world):
    run = _write_run(world, "linear", "run-processor")
    merge(run, world / "merged-processor")
    processor = AutoProcessor.from_pretrained(world / "merged-processor")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages)
    assert text == "<s>Q: <image>\nWhat is this?\nA:"
    assert "[/INST]" in chat_template(get_template("llava_llama_2"))


def test_a_session_answers_in_batches_and_streams_the_same(world):
    session = load_session(_write_run(world, "linear", "run-session"))
    turns = [[Turn("user", "<image>\nWhat is this?")], [Turn("user", "<image>\nWhere is the fox?")]]
    images = [[world / "data" / "0.png"], [world / "data" / "1.png"]]
    sampling = Sampling(max_new_tokens=6)
    batch = session.answer_batch(turns, images, sampling)
    single = ["".join(session.stream(t, i, sampling)).strip() for t, i in zip(turns, images, strict=True)]
    assert batch == single
    assert any(batch)


def test_unfinished_and_missing_checkpoints_are_refused(world):
    run = _write_run(world, "linear", "run-unfinished")
    step = resolve_step(run)
    assert list_steps(run) == [step]
    (step / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="is not complete"):
        resolve_step(step)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        merge(run, world / "never")
    assert not (world / "never").exists()
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_step(world / "nowhere")
    (world / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        merge(run, world / "there")


def test_a_stream_that_differs_from_its_header_is_refused(tmp_path):
    entries = [("a", torch.zeros(2, 3))]
    with pytest.raises(CheckpointError, match="expected"):
        write_safetensors_stream(tmp_path / "x.safetensors", entries, [("a", torch.float32, (3, 2))])
