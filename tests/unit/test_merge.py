"""A merged folder loads in transformers and in llava_ds, with our logits; a merge streams, and refuses damage."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from llava_ds.checkpoint.formats.transformers import read_transformers
from llava_ds.checkpoint.formats.transformers_export import plan_transformers
from llava_ds.checkpoint.fragments import shard_names
from llava_ds.checkpoint.layout import find_damage, hash_file, list_steps, read_run, resolve_step
from llava_ds.checkpoint.lazy import LazyTensor
from llava_ds.checkpoint.load import load_model
from llava_ds.checkpoint.merge import merge, trial_export
from llava_ds.checkpoint.runs import open_run
from llava_ds.constants import IMAGE_TOKEN_INDEX
from llava_ds.data.images import ImageTransform, open_image
from llava_ds.errors import CheckpointError
from llava_ds.inference.session import Sampling, before_stop, load_session
from llava_ds.models.build import describe_llm
from llava_ds.ops.row_plan import plan_rows
from llava_ds.schema import Turn
from llava_ds.text.chat_template import resolve_template
from llava_ds.text.encode import encode_prompt
from llava_ds.text.templates import get_template
from tests.helpers.tiny import write_run, write_step, write_world

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


def _rewrite(merged, out):
    """The folder as transformers itself writes it, without a word of ours."""
    shutil.copytree(merged, out)
    for name in ("llava_ds.json", "COMPLETE", "manifest.json", "model.safetensors"):
        (out / name).unlink()
    LlavaForConditionalGeneration.from_pretrained(merged).save_pretrained(out)
    return out


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_a_model_comes_back_as_it_was(world, tmp_path, projector, aspect):
    changes = {"model__projector": projector, "data__image_aspect_ratio": aspect, "data__template": "v1"}
    stored = open_run(write_run(world, f"run-back-{projector}-{aspect}", **changes))
    merge(world / f"run-back-{projector}-{aspect}", tmp_path / "merged")
    notes = []
    for folder in (tmp_path / "merged", _rewrite(tmp_path / "merged", tmp_path / "theirs")):
        again = read_transformers(folder, log=notes.append)
        assert again.weights.keys() == stored.weights.keys()
        assert all(torch.equal(again.weights[name].whole(), value.whole()) for name, value in stored.weights.items())
        for field in ("tower", "select_layer", "projector", "template", "image_aspect_ratio", "dtype", "zero_features"):
            assert getattr(again, field) == getattr(stored, field), field
        assert again.text_config["vocab_size"] == stored.text_config["vocab_size"] == 355
    assert len(notes) == 1
    assert "theirs does not say which template it was trained with: v1 is taken" in notes[0]


ASKED = ["What is this?", "Where is the fox?", "Q", "two  green apples, é on the left?"]


@pytest.mark.parametrize("template", ["short", "v1", "v0"])
def test_transformers_answers_what_a_session_answers(world, template):
    """Greedy, as generation_config.json says; pictures of odd sizes; the processor's pixels differ by rounding."""
    run, out = write_run(world, f"run-talk-{template}", data__template=template), world / f"talk-{template}"
    merge(run, out)
    session, processor = load_session(run), AutoProcessor.from_pretrained(out)
    model = LlavaForConditionalGeneration.from_pretrained(out).eval()
    shades = torch.arange(61 * 47 * 3).remainder(251).to(torch.uint8).reshape(47, 61, 3)
    Image.fromarray(shades.numpy()).save(world / "odd.png")
    pictures = [world / "data" / "0.png", world / "odd.png", world / "data" / "2.png", None]
    answers = []
    for question, picture in zip(ASKED, pictures, strict=True):
        content = [{"type": "text", "text": question}]
        content = [{"type": "image"}, *content] if picture else content
        turns = [Turn("user", f"<image>\n{question}" if picture else question)]
        ours = session.answer_batch([turns], [[picture] if picture else []], Sampling(max_new_tokens=9))[0]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [open_image(picture)] if picture else None
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(ids, skip_special_tokens=True).strip() == ours
        answers.append(ours)
    assert all(answers)
    # Behind the long prompts of the others this small random LLM answers the same to everything.
    assert len(set(answers)) > 2 or template != "short"


@pytest.mark.parametrize(("template", "eos"), [("v1", "</s>"), ("v0", "</s>"), ("chatml", "<|im_end|>")])
def test_the_generation_config_is_valid_and_stops_where_the_template_does(tmp_path, template, eos):
    write_world(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**config | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "llm")
    merge(write_run(tmp_path, data__template=template), tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    settings.validate(strict=True)
    assert (settings.do_sample, settings.temperature, settings.top_p) == (False, None, None)
    assert settings.eos_token_id == tokenizer.convert_tokens_to_ids(eos)
    assert (settings.bos_token_id, settings.pad_token_id) == (1, len(tokenizer) + 1)
    settings.save_pretrained(tmp_path)  # what transformers refuses where sampling keys are left


def test_a_merge_in_shards_has_an_index_that_transformers_reads(world):
    run, out = write_run(world, "run-shards"), world / "merged-shards"
    merge(run, out, max_shard_bytes=90_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(file.name for file in out.glob("*.safetensors"))
    assert find_damage(out) == []
    merge(run, world / "merged-whole")
    whole = LlavaForConditionalGeneration.from_pretrained(world / "merged-whole").state_dict()
    theirs, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, whole[name]) for name, value in theirs.state_dict().items())
    ours, again = load_model(run).model.state_dict(), load_model(out).model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours.items())


def test_added_rows_are_the_mean_of_the_others(world):
    run, out = write_run(world, "run-rows"), world / "merged-rows"
    merge(run, out)
    with safe_open(out / "model.safetensors", "pt") as weights:
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            table = weights.get_tensor(name)
            assert table.shape == (384, 64)  # 355 words and two more, up to a multiple of 64
            mean = table[:355].double().mean(0).float()
            assert torch.equal(table[355:], mean.expand(29, -1))


def test_a_damaged_shard_is_refused_by_name_and_hash(world):
    run = write_run(world, "run-flipped")
    files = [resolve_step(run) / shard_names(rank, 3)[0] for rank in (0, 2)]
    was = [hash_file(file) for file in files]
    for file in files:
        content = bytearray(file.read_bytes())
        content[-5] ^= 64
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as failure:
        merge(run, world / "out-flipped")
    for file, xxh128 in zip(files, was, strict=True):
        assert f"{file}: xxh128 {xxh128[:16]} expected, {hash_file(file)[:16]} found" in str(failure.value)
    assert not list(world.glob("*out-flipped*"))
    # The optimizer's states are not merged, so nobody reads them.
    sound = write_run(world, "run-without-optimizer")
    (resolve_step(sound) / shard_names(1, 3)[1]).unlink()
    merge(sound, world / "out-sound")


def test_a_full_disk_is_noticed_before_anything_is_written(world, monkeypatch):
    run, needed = write_run(world, "run-full"), []
    free = shutil.disk_usage(world)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: needed.append(list(Path(path).iterdir())) or free)
    with pytest.raises(CheckpointError, match="has 1000 bytes free, [0-9]+ are needed"):
        merge(run, world / "out-full")
    assert needed == [[]]
    assert not list(world.glob("*out-full*"))


def test_progress_counts_every_byte(world):
    run, phases = write_run(world, "run-progress"), {}

    def begin(name, num_bytes):
        phases[name] = [num_bytes, 0]

        def advance(more):
            phases[name][1] += more

        return advance

    merge(run, world / "merged-progress", phases=begin)
    assert sorted(phases) == ["checking", "writing"]
    assert all(total > 0 for total, _ in phases.values())
    assert all(done == total for total, done in phases.values()), phases


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_a_trial_export_writes_all_but_the_weights_and_reads_none(world, tmp_path, projector):
    run = write_run(world, f"run-trial-{projector}", model__projector=projector)
    merge(run, tmp_path / "merged")
    stored = open_run(run)

    def refuse(*_):
        raise AssertionError("a weight was read")

    unread = {name: LazyTensor(value.dtype, value.shape, refuse, "") for name, value in stored.weights.items()}
    (tmp_path / "scratch").mkdir()
    num_bytes = trial_export(replace(stored, weights=unread), tmp_path / "scratch")
    written = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    assert written.keys() - {"model.safetensors", "manifest.json", "COMPLETE"} == {
        file.name for file in (tmp_path / "scratch").iterdir() if file.read_bytes() == written[file.name]
    }
    # The header and its length are the rest of the file.
    assert 0 < len(written["model.safetensors"]) - num_bytes < 20_000
    assert sum(tensor.num_bytes for _, tensor in plan_transformers(stored)) == num_bytes


def test_a_trial_export_refuses_what_transformers_would_not_load(world, tmp_path):
    stored = open_run(write_run(world, "run-odd"))
    weights = dict(stored.weights)
    moved = weights.pop("llm.model.norm.weight")
    with pytest.raises(CheckpointError) as failure:
        trial_export(replace(stored, weights=weights | {"llm.model.ln_f.weight": moved}), tmp_path)
    assert "language_model.model.norm.weight: missing would be written, (64,) is expected" in str(failure.value)
    assert "language_model.model.ln_f.weight: (64,) would be written, nothing is expected" in str(failure.value)


_MEASURED = """
import sys
from pathlib import Path
from llava_ds.checkpoint.merge import merge

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

peak = before = anonymous()

def begin(name, num_bytes):
    def advance(_):
        global peak
        peak = max(peak, anonymous())
    return advance

merge(Path(sys.argv[1]), Path(sys.argv[2]), phases=begin)
print(peak - before)
"""


def _memory_of_merge(world, name, width):
    """Peak of the anonymous memory that a merge adds, measured in a process of its own; and the bytes of its source."""
    config = json.loads((world / "llm" / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 5, "head_dim": width // 4}
    shutil.copytree(world / "llm", world / name / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    (world / name / "llm" / "config.json").write_text(json.dumps(config))
    run = write_run(world, f"run-{name}", trained=("projector",))
    record = read_run(resolve_step(run))
    record["sources"]["llm"] |= {"folder": str(world / name / "llm"), "files": {}}
    shapes = {f"llm.{key}": shape for key, shape in describe_llm(config).shapes.items()}
    shapes |= {"projector.weight": (width, 32), "projector.bias": (width,)}
    weights = {key: torch.linspace(-1, 1, math.prod(shape)).reshape(shape) for key, shape in shapes.items()}
    shutil.rmtree(run)
    write_step(run, weights, record, optimizer=False)
    command = [sys.executable, "-c", _MEASURED, str(run), str(world / f"merged-{name}")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return int(done.stdout), sum(tensor.numel() * 4 for tensor in weights.values())


def test_a_merge_never_holds_the_model(world):
    """benchmarks/merge_ckpt.py does the same with models that are 20 to 40 times as large."""
    memory, num_bytes = _memory_of_merge(world, "large", 800)
    assert num_bytes > 190e6
    # What is there at a time: pieces of 16 MiB, read, joined from several shards, written; buffers of hashing threads.
    assert memory < 150e6


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
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be read here"):
        merge(world / "llm", world / "never")
    merge(write_run(world, "run-twice"), world / "merged-once")
    with pytest.raises(CheckpointError, match="is no run: its layout is transformers; tools/convert goes on"):
        merge(world / "merged-once", world / "never")
