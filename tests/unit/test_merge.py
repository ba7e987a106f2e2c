"""A merged folder loads in transformers and in llava_ds, with our logits."""

import json
import re
from dataclasses import replace
from threading import Thread

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from llava_ds.checkpoint.layout import list_steps, resolve_step, write_safetensors_stream
from llava_ds.checkpoint.load import load_model
from llava_ds.checkpoint.merge import merge
from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.data.images import ImageTransform, open_image
from llava_ds.errors import CheckpointError
from llava_ds.inference.session import Sampling, before_stop, load_session
from llava_ds.ops.row_plan import plan_rows
from llava_ds.schema import Turn
from llava_ds.text.chat_template import resolve_template
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
    embeds = model.inputs_embeds(ids, model.patch_features(pixels), plan_rows(ids))
    return model.llm(inputs_embeds=embeds).logits


IMAGE_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
CONVERSATIONS = {
    "one question": ([IMAGE_QUESTION], 1),
    "no image": ([{"role": "user", "content": "What is  this?"}], 0),
    "two rounds": (
        [
            IMAGE_QUESTION,
            {"role": "assistant", "content": [{"type": "text", "text": "a red fox"}]},
            {"role": "user", "content": [{"type": "text", "text": "Where is the fox?"}]},
        ],
        1,
    ),
    "images in a text": ([{"role": "user", "content": "Is  <image><image> this <image>"}], 3),
}


def _turns(messages) -> list[Turn]:
    def text(content) -> str:
        if isinstance(content, str):
            return content
        return "".join("<image>\n" if part["type"] == "image" else part["text"] for part in content)

    return [Turn(message["role"], text(message["content"])) for message in messages]


@pytest.mark.parametrize("name", ["short", "v0", "v1", "llava_v1", "llava_llama_2", "plain"])
def test_the_processor_writes_the_same_prompt(world, name):
    out = world / f"merged-template-{name}"
    merge(write_run(world, f"run-template-{name}", data__template=name), out)
    processor, tokenizer = AutoProcessor.from_pretrained(out), load_model(out).tokenizer
    picture = open_image(world / "data" / "0.png")
    num_compared = 0
    for messages, num_images in CONVERSATIONS.values():
        turns = _turns(messages)
        if name == "plain" and len(turns) > 1:
            continue
        text = processor.apply_chat_template(messages)
        inputs = processor(text=text, images=[picture] * num_images or None)
        ids = encode_prompt(turns, tokenizer, get_template(name), 9)
        image_id = processor.image_token_id
        assert inputs["input_ids"][0] == [image_id if i == IMAGE_TOKEN_INDEX else i for i in ids], text
        assert ids.count(IMAGE_TOKEN_INDEX) == 9 * num_images
        num_compared += 1
    assert num_compared == (3 if name == "plain" else 4)
    with pytest.raises(Exception, match="knows the roles user and assistant only, not system"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}, IMAGE_QUESTION])


@pytest.mark.parametrize("name", ["chat_template", "mpt", "mistral"])
def test_the_processor_writes_the_same_prompt_with_markers(tmp_path, name):
    """A tokenizer with chat markers, and one template that is its own."""
    write_world(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**config | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "llm")
    run, out = write_run(tmp_path, data__template=name), tmp_path / "merged"
    merge(run, out)
    processor, picture = AutoProcessor.from_pretrained(out), open_image(tmp_path / "data" / "0.png")
    num_compared = 0
    for loaded in (load_model(run), load_model(out)):
        for messages, num_images in CONVERSATIONS.values():
            text = processor.apply_chat_template(messages, add_generation_prompt=name == "chat_template")
            ids = processor(text=text, images=[picture] * num_images or None)["input_ids"][0]
            template = resolve_template(name, loaded.tokenizer)
            expected = encode_prompt(_turns(messages), loaded.tokenizer, template, 9)
            assert ids == [processor.image_token_id if i == IMAGE_TOKEN_INDEX else i for i in expected], text
            num_compared += 1
    assert num_compared == 8


def test_a_tokenizer_that_prepends_a_space_everywhere_gives_the_same_ids(world, tmp_path):
    """The tokenizer.json of the first LLaMA models does."""
    write_world(tmp_path)
    file = tmp_path / "llm" / "tokenizer.json"
    raw = json.loads(file.read_text())
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    raw |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, replace_spaces]}}
    file.write_text(json.dumps(raw))
    run, out = write_run(tmp_path, data__template="v1"), tmp_path / "merged"
    merge(run, out)
    messages = CONVERSATIONS["two rounds"][0]
    processor = AutoProcessor.from_pretrained(out)
    text = processor.apply_chat_template(messages)
    ids = processor(text=text, images=[open_image(world / "data" / "0.png")])["input_ids"][0]
    for tokenizer in (load_model(run).tokenizer, load_model(out).tokenizer):
        expected = encode_prompt(_turns(messages), tokenizer, get_template("v1"), 9)
        assert ids == [processor.image_token_id if i == IMAGE_TOKEN_INDEX else i for i in expected]


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [(61, 44), (44, 90), (50, 50), (20, 31)])
def test_the_processor_makes_the_same_pixels(world, aspect, size):
    out = world / f"merged-{aspect}"
    if not out.exists():
        merge(write_run(world, f"run-{aspect}", data__image_aspect_ratio=aspect), out)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, size[1]), torch.linspace(0, 1, size[0]), indexing="ij")
    shades = torch.stack([rows, columns, (9 * rows * columns).sin().abs()], -1)
    picture = Image.fromarray((255 * shades).to(torch.uint8).numpy())
    theirs = AutoProcessor.from_pretrained(out).image_processor(picture, return_tensors="pt").pixel_values[0]
    ours = ImageTransform.for_tower(load_model(out).model.vision_tower.spec, aspect).from_image(picture)
    # Two of 255 shades: PIL and torchvision round differently. Without the padding it is a hundred.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2 / 127.5)


@pytest.mark.parametrize(("precision", "stored", "name"), [("fp32", "F32", "float32"), ("bf16", "BF16", "bfloat16")])
def test_a_merge_keeps_the_precision_of_its_run(world, precision, stored, name):
    run, out = write_run(world, f"run-{precision}", train__precision=precision), world / f"merged-{precision}"
    merge(run, out)
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {stored}
    assert json.loads((out / "config.json").read_text())["dtype"] == name
    dtype = getattr(torch, name)
    theirs = LlavaForConditionalGeneration.from_pretrained(out)
    assert theirs.dtype == dtype
    ours = load_model(run, dtype=dtype).model.state_dict()
    again = load_model(out, dtype=dtype).model.state_dict()
    vocab = ours["llm.lm_head.weight"].shape[0]
    for key, value in ours.items():
        assert torch.equal(again[key][:vocab] if again[key].shape != value.shape else again[key], value), key


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
