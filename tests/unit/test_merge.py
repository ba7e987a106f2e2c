"""A merged folder loads in transformers and in llava_ds, with our logits."""

import re
from dataclasses import replace
from threading import Thread

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_ds.checkpoint.layout import list_steps, resolve_step, write_safetensors_stream
from llava_ds.checkpoint.load import load_model
from llava_ds.checkpoint.merge import chat_template, merge
from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.data.images import ImageTransform
from llava_ds.errors import CheckpointError
from llava_ds.inference.session import Sampling, before_stop, load_session
from llava_ds.schema import Turn
from llava_ds.text.encode import encode_prompt
from llava_ds.text.templates import get_template
from tests.helpers.tiny import write_run, write_world

# fp32; the two implementations sum in another order. Logits are of size 1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("merge"))


@pytest.mark.parametrize(("projector", "export"), [("linear", "relu_pair"), ("mlp2x_gelu", "mlp")])
def test_logits_equal_ours(world, projector, export):
    run = write_run(world, f"run-{projector}", model__projector=projector)
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
    assert hf.shape[-1] > vocab
    assert (hf.argmax(-1) < vocab).all()  # the words that the merge adds are never the likeliest


def _our_logits(model, ids, pixels):
    rows = (ids.flatten() == IMAGE_TOKEN_INDEX).nonzero().flatten()
    embeds = model.inputs_embeds(ids, model.patch_features(pixels), rows)
    return model.llm(inputs_embeds=embeds).logits


def test_the_processor_writes_the_same_prompt(world):
    run = write_run(world, "run-processor")
    merge(run, world / "merged-processor")
    processor = AutoProcessor.from_pretrained(world / "merged-processor")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages)
    assert text == "<s>Q: <image>\nWhat is this?\nA:"
    assert "[/INST]" in chat_template(get_template("llava_llama_2"))


def test_a_session_answers_in_batches_and_streams_the_same(world):
    session = load_session(write_run(world, "run-session"))
    turns = [[Turn("user", "<image>\nWhat is this?")], [Turn("user", "<image>\nWhere is the fox?")]]
    images = [[world / "data" / "0.png"], [world / "data" / "1.png"]]
    sampling = Sampling(max_new_tokens=6)
    batch = session.answer_batch(turns, images, sampling)
    single = ["".join(session.stream(t, i, sampling)).strip() for t, i in zip(turns, images, strict=True)]
    assert batch == single
    assert any(batch)
    # The same where a text ends an answer: here the first letters in it.
    stop = re.findall("[a-z]{2,}", batch[0])[0]
    stopped = replace(session, template=replace(session.template, stop=stop))
    answer = "".join(stopped.stream(turns[0], images[0], sampling)).strip()
    assert [answer] == stopped.answer_batch(turns[:1], images[:1], sampling)
    assert answer == batch[0].split(stop)[0].strip() != batch[0]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a#", "#", "#b", "c"], "a"),
        (["a##", "b"], "a##b"),
        (["a", "##"], "a##"),
        (["##", "####"], ""),
        ([], ""),
    ],
)
def test_a_stop_string_may_be_spread_over_pieces(pieces, expected):
    assert "".join(before_stop(pieces, "###")) == expected
    assert "".join(before_stop(pieces, None)) == "".join(pieces)


def test_a_stream_raises_what_fails_in_its_thread(world, monkeypatch):
    session = load_session(write_run(world, "run-failing"))

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.model.llm, "generate", fail)
    outcome = []

    def consume():
        try:
            list(session.stream([Turn("user", "What is this?")], [], Sampling(2)))
        except RuntimeError as error:
            outcome.append(str(error))

    reader = Thread(target=consume, daemon=True)  # a hang fails this test, and not the whole suite
    reader.start()
    reader.join(timeout=30)
    assert outcome == ["out of memory"]


def test_unfinished_and_missing_checkpoints_are_refused(world):
    run = write_run(world, "run-unfinished")
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
