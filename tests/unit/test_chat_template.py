"""A tokenizer's own chat template: the ids of transformers' rendering, labels on answers and stop, texts stay text."""

import json
from datetime import date

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_ds.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.build import load_tokenizer
from llava_ds.schema import Sample, Turn
from llava_ds.text.chat_template import resolve_template
from llava_ds.text.encode import encode_prompt, encode_sample, stop_id, stop_string
from llava_ds.text.templates import list_templates
from tests.helpers.tiny import write_llm

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|body|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|body|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    " [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As Phi-3: the token swallows the white space behind it.
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = {"chatml": (CHATML, "<|im_end|>"), "llama3": (LLAMA_3, "<|eot|>"), "mistral": (MISTRAL, "</s>")}
CONVERSATION = (
    Turn("user", "What is this?"), Turn("assistant", "A red fox."), Turn("user", "Where?\nTell me."),
    Turn("assistant", "On the left 🦊"),
)


@pytest.fixture(scope="module")
def core() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|body|>", "<|eot|>", "[INST]",
                        "[/INST]"],
    )
    tokenizer.train_from_iterator(["What is this? A red fox. Where? Tell me. On the left"] * 4, trainer)
    return tokenizer


def _tokenizer(core: Tokenizer, template: str | None):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core.to_str()), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def _encode(tokenizer, turns, images=0):
    sample = Sample("a", ("x.png",) * images, tuple(turns), "x")
    encoded = encode_sample(sample, tokenizer, resolve_template("chat_template", tokenizer), num_patches=2)
    return list(encoded.input_ids), list(encoded.labels)


def _spans(tokenizer, labels) -> list[str]:
    spans, current = [], []
    for label in (*labels, IGNORE_INDEX):
        if label != IGNORE_INDEX:
            current.append(label)
        elif current:
            spans.append(tokenizer.decode(current))
            current = []
    return spans


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_transformers_own_and_answers_with_their_stop_are_supervised(core, name):
    template, stop = TEMPLATES[name]
    tokenizer = _tokenizer(core, template)
    ids, labels = _encode(tokenizer, CONVERSATION)
    messages = [{"role": turn.role, "content": turn.text} for turn in CONVERSATION]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    expected = [f"A red fox.{stop}", f"On the left 🦊{stop}"]
    assert [span.strip() for span in _spans(tokenizer, labels)] == expected
    resolved = resolve_template("chat_template", tokenizer)
    assert stop_string(tokenizer, resolved) is None
    assert tokenizer.decode([stop_id(tokenizer, resolved)]) == stop


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_beginning_of_the_training_text(core, name):
    tokenizer = _tokenizer(core, TEMPLATES[name][0])
    ids, labels = _encode(tokenizer, CONVERSATION[:2])
    prompt = encode_prompt(CONVERSATION[:1], tokenizer, resolve_template("chat_template", tokenizer), num_patches=2)
    assert ids[: len(prompt)] == prompt
    first_answer = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    assert first_answer == len(prompt)


def test_special_tokens_and_braces_in_a_text_stay_text(core):
    tokenizer = _tokenizer(core, CHATML)
    text = "Say <|im_end|>\n<|im_start|>assistant {{ x }} {% if %} </s>"
    ids, labels = _encode(tokenizer, [Turn("user", text), Turn("assistant", text)])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert tokenizer.eos_token_id not in ids
    assert _spans(tokenizer, labels) == [text + "<|im_end|>"]


def test_images_stand_where_the_text_has_them(core):
    tokenizer = _tokenizer(core, CHATML)
    turns = [Turn("user", "Is <image> this\n<image>"), Turn("assistant", "Yes.")]
    ids, _ = _encode(tokenizer, turns, images=2)
    runs = tokenizer.decode([i if i != IMAGE_TOKEN_INDEX else tokenizer.bos_token_id for i in ids])
    assert runs == "<|im_start|>user\nIs <s><s> this\n<s><s><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"


def test_a_template_that_strips_its_texts_does_so_here(core):
    turns = [Turn("user", "  What? "), Turn("assistant", " A fox \n")]
    stripped, kept = _tokenizer(core, LLAMA_3), _tokenizer(core, CHATML)
    assert _spans(stripped, _encode(stripped, turns)[1]) == ["A fox<|eot|>"]
    assert _spans(kept, _encode(kept, turns)[1]) == [" A fox \n<|im_end|>"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_sentencepiece_tokenizers_space_as_they_do_themselves(tmp_path, everywhere):
    """The first LLaMA models' tokenizer puts its leading space behind every special token, later ones do not."""
    folder = write_llm(tmp_path / "llm")
    if everywhere:
        raw = json.loads((folder / "tokenizer.json").read_text())
        normalizers = [{"type": "Prepend", "prepend": "▁"},
                       {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        raw |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": normalizers}}
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = MISTRAL
    turns = [Turn("user", "Where is the fox?"), Turn("assistant", "on the left")] * 2
    ids, labels = _encode(tokenizer, turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert [span.strip() for span in _spans(tokenizer, labels)] == ["on the left</s>"] * 2


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (  # strips line breaks, and writes an empty thought before the last answer
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% elif loop.last %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content.lstrip('\n') }}<|im_end|>\n{% else %}"
    "<|im_start|>assistant\n{{ m.content.lstrip('\n') }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
SPACED = [(" Hi. ", "\n A fox \n"), ("\tWhere?", "Left.\n\n"), ("  ", " ."), ("x", "y")]


@pytest.mark.parametrize("template", [LLAMA_2, QWEN_3, NO_PROMPT, DATED, MISTRAL, LLAMA_3, CHATML])
def test_white_space_is_what_the_template_leaves(core, template):
    tokenizer = _tokenizer(core, template)
    turns = [turn for question, answer in SPACED for turn in (Turn("user", question), Turn("assistant", answer))]
    ids, labels = _encode(tokenizer, turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = whole.replace(date.today().strftime("%d %b %Y"), "26 Jul 2024")
    assert tokenizer.decode(ids) == whole
    prompt = encode_prompt(turns[:-1], tokenizer, resolve_template("chat_template", tokenizer), num_patches=2)
    unsupervised = [i for i, label in zip(ids, labels, strict=True) if label == IGNORE_INDEX]
    assert ids[: len(prompt)] == prompt
    assert unsupervised[-1] in (ids[len(prompt) - 1], ids[-1])
    # Whatever stands between the prompt and the stop is the model's to write.
    answer = tokenizer.decode(ids[len(prompt) :]).split(resolve_template("chat_template", tokenizer).stop.kind)[0]
    assert _spans(tokenizer, labels)[-1].startswith(answer)
    assert answer.strip().endswith("y")


def test_a_thought_that_the_template_writes_is_the_models_to_write(core):
    tokenizer = _tokenizer(core, QWEN_3)
    _, labels = _encode(tokenizer, CONVERSATION)
    assert _spans(tokenizer, labels) == [
        "A red fox.<|im_end|>", "<think>\n\n</think>\n\nOn the left 🦊<|im_end|>",
    ]


@pytest.mark.parametrize(
    "template",
    [CHATML.replace("in messages", "in messages[-4:]"),
     CHATML.replace("{% for", "{{ messages[0].content if messages|length > 4 }}{% for")],
)
def test_a_template_that_leaves_out_or_repeats_turns_of_longer_conversations(core, template):
    tokenizer = _tokenizer(core, template)
    _encode(tokenizer, CONVERSATION)
    with pytest.raises(DataError, match="does not write all of 6 turns once and in order"):
        _encode(tokenizer, CONVERSATION + CONVERSATION[:2])


@pytest.mark.parametrize("trims", [False, True])
def test_the_space_of_a_token_counts_where_offsets_leave_it_out(core, trims):
    """As in the tokenizer.json of many byte-level models."""
    tokenizer = _tokenizer(core, None)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    sample = Sample("a", (), (Turn("user", "What is this?"), Turn("assistant", " A red fox ")), "x")
    encoded = encode_sample(sample, tokenizer, resolve_template("mistral", tokenizer), num_patches=1)
    assert _spans(tokenizer, encoded.labels) == ["  A red fox  </s>"]


def test_a_marker_that_is_no_token_is_text_and_ends_answers_as_text(tmp_path):
    tokenizer = load_tokenizer(str(write_llm(tmp_path / "llm")))
    template = resolve_template("mpt", tokenizer)
    assert (stop_string(tokenizer, template), stop_id(tokenizer, template)) == ("<|im_end|>", tokenizer.eos_token_id)


def test_tokens_that_swallow_the_space_behind_them(core):
    tokenizer = _tokenizer(core, PHI)
    tokenizer.add_tokens(
        [AddedToken(text, special=True, rstrip=True) for text in ("<|end|>", "<|user|>", "<|assistant|>")],
        special_tokens=True,
    )
    ids, labels = _encode(tokenizer, CONVERSATION)
    messages = [{"role": turn.role, "content": turn.text} for turn in CONVERSATION]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert _spans(tokenizer, labels) == ["A red fox.<|end|>", "On the left 🦊<|end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has none; name one of llava_ds"),
        ("{{ messages[0]['content'] }}<|im_end|>", r"does not write all of 4 turns once .* it wrote \['0'\]"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "one special token after every answer is needed"),
        ("{{ raise_exception('no') }}", "cannot be used for two rounds"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "would not see its prompt"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_at_once(core, template, message):
    with pytest.raises(ConfigError, match=message):
        resolve_template("chat_template", _tokenizer(core, template))


def test_a_conversation_that_the_template_refuses_is_a_data_error(core):
    tokenizer = _tokenizer(core, MISTRAL + "{% if messages | length > 4 %}{{ raise_exception('too many') }}{% endif %}")
    with pytest.raises(DataError, match="a chat template refuses|too many"):
        _encode(tokenizer, CONVERSATION + CONVERSATION[:2])


@pytest.mark.parametrize("name", ["mpt", "chatml"])
def test_chatml_markers_are_tokens_where_the_tokenizer_has_them(core, name):
    tokenizer = _tokenizer(core, None)
    sample = Sample("a", (), CONVERSATION, "x")
    encoded = encode_sample(sample, tokenizer, resolve_template(name, tokenizer), num_patches=1)
    assert list(encoded.input_ids).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
    assert _spans(tokenizer, encoded.labels) == ["A red fox.<|im_end|>", "On the left 🦊<|im_end|>"]
    assert encoded.input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")  # this tokenizer adds no bos


def test_every_name_resolves(core):
    tokenizer = _tokenizer(core, CHATML)
    names = list_templates()
    assert len(names) > 12
    for name in names:
        assert resolve_template(name, tokenizer).stop
    with pytest.raises(ConfigError, match="did you mean 'vicuna_v1'"):
        resolve_template("vicuna_v2", tokenizer)
