"""Ids and labels equal those of the official code, id for id and label for label."""

import io
import json
import shutil
from importlib import util
from pathlib import Path

import pytest
import sentencepiece

from llava_ds.constants import IGNORE_INDEX
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.build import load_tokenizer
from llava_ds.schema import EncodedSample, Sample, Turn
from llava_ds.text.encode import encode_prompt, encode_sample
from llava_ds.text.placement import apply_placement
from llava_ds.text.sentencepiece_tokenizer import is_llama_like
from llava_ds.text.templates import get_template
from llava_ds.text.truncation import encode_within

GOLDEN = Path(__file__).parents[1] / "golden"
ROLES = {"human": "user", "gpt": "assistant"}
# Records that ours refuses with an error that names them, although the official code gives something valid: it ignores
# an image without a placeholder, and a second placeholder without an image.
REFUSED = {"two_images_one_turn", "image_field_but_no_token"}
# The official code turns these typed strings into special tokens; ours keep them text.
TYPED_SPECIALS = {"eos_in_question", "eos_in_answer", "unk_in_text"}
# Of the records that the official code crashes on or masks whole, those that ours refuses; it trains on the others.
HANDLED = {
    "long_question_text": "no supervised token is left",
    "empty_answer": "an empty answer", "ends_with_human": "must alternate", "ends_with_human_image": "must alternate",
    "two_humans_in_a_row": "must alternate", "two_gpts_in_a_row": "must alternate",
    "long_multi_text": "no supervised token is left", "long_exact_words": "no supervised token is left",
}


# The files that Vicuna 1.5 was published with, besides its tokenizer.model.
VICUNA_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False},
    "legacy": False,
    "model_max_length": 4096,
    "pad_token": None,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": False},
}
VICUNA_SPECIAL = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "pad_token": "<unk>"}


def _write_vicuna(folder: Path, **files: object) -> Path:
    package = util.find_spec("mistral_common")
    assert package and package.submodule_search_locations, "mistral-common (extra dev) holds the test tokenizer"
    folder.mkdir()
    shutil.copyfile(
        Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1", folder / "tokenizer.model"
    )
    files = {"tokenizer_config": VICUNA_CONFIG, "special_tokens_map": VICUNA_SPECIAL, **files}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As train.py loads it."""
    return load_tokenizer(str(_write_vicuna(tmp_path_factory.mktemp("golden") / "vicuna")))


def _sample(case_id: str) -> Sample:
    record = next(r for r in json.loads((GOLDEN / "conversations.json").read_text()) if r["id"] == case_id)
    turns = tuple(Turn(ROLES.get(t["from"], t["from"]), t["value"]) for t in record["conversations"])
    images = (record["image"],) if record.get("image") else ()
    return Sample(case_id, images, turns, "conversations.json")


def _cases(template: str) -> list[dict]:
    """Each conversation at both limits; the valid ones with ids and labels."""
    cases = json.loads((GOLDEN / f"tokenization_{template}.json").read_text())["cases"]
    whole = {case["id"]: case for case in cases if case["limit"] == 2048}
    cases = [whole[case["id"]] | {"limit": case["limit"]} if "as" in case else case for case in cases]
    for case in cases:
        if "failed" not in case:
            supervised = {i for begin, end in case["supervised"] for i in range(begin, end)}
            case["labels"] = [i if n in supervised else IGNORE_INDEX for n, i in enumerate(case["input_ids"])]
    assert len(cases) == 72
    return cases


def _encode_front(case: dict, tokenizer, template: str) -> EncodedSample:
    sample = apply_placement(_sample(case["id"]), "front", 0, 0)
    return encode_within(sample, tokenizer, get_template(template), 1, case["limit"], "official")


@pytest.mark.parametrize(
    ("template", "num_valid", "num_exact"),
    [("plain", 20, 18), ("v0", 72, 62), ("v1", 51, 47), ("llava_llama_2", 50, 46)],
)
def test_ids_and_labels_match_the_official_code(tokenizer, template, num_valid, num_exact):
    """Every conversation at both limits, cut as the official code cuts."""
    valid = [case for case in _cases(template) if "failed" not in case]
    assert len(valid) == num_valid
    num_compared = 0
    for case in valid:
        if case["id"] in REFUSED:
            with pytest.raises(DataError, match=f"{case['id']}.*placeholders but"):
                _encode_front(case, tokenizer, template)
            continue
        encoded = _encode_front(case, tokenizer, template)
        if case["id"] in TYPED_SPECIALS:
            assert not {0, 2} & set(encoded.input_ids), case["id"]
            continue
        assert list(encoded.input_ids) == case["input_ids"], case["id"]
        assert list(encoded.labels) == case["labels"], case["id"]
        num_compared += 1
    assert num_compared == num_exact


@pytest.mark.parametrize(("template", "num_failed", "num_trained"), [("v1", 21, 8), ("llava_llama_2", 22, 8)])
def test_what_the_official_code_masks_or_crashes_on(tokenizer, template, num_failed, num_trained):
    """Trained on with the right labels, or refused with the record's name."""
    failed = [case for case in _cases(template) if "failed" in case]
    assert len(failed) == num_failed
    trained = 0
    for case in failed:
        if case["id"] in HANDLED:
            with pytest.raises(DataError, match=f"(?s){case['id']}.*{HANDLED[case['id']]}"):
                _encode_front(case, tokenizer, template)
            continue
        encoded = _encode_front(case, tokenizer, template)
        text = tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
        answer = f"{_sample(case['id']).turns[-1].text}</s>"
        assert text.replace(" </s>", "</s>") == answer.replace(" </s>", "</s>"), case["id"]
        trained += 1
    assert trained == num_trained


def test_v0_supervises_answers_and_stop_only(tokenizer):
    sample = Sample("a", (), (Turn("user", "Who?"), Turn("assistant", "Me."), Turn("user", "Why?"),
                              Turn("assistant", "So.")), "x")
    encoded = encode_sample(sample, tokenizer, get_template("v0"), num_patches=1)
    spans, current = [], []
    for label in (*encoded.labels, IGNORE_INDEX):
        if label != IGNORE_INDEX:
            current.append(label)
        elif current:
            spans.append(tokenizer.decode(current))
            current = []
    assert spans == ["Me.\n###", "So.\n###"]


@pytest.mark.parametrize("template", ["v0", "v1", "llava_llama_2", "mistral", "mpt", "chatml", "short"])
def test_a_prompt_is_the_beginning_of_the_training_text(tokenizer, template):
    turns = (Turn("user", "<image>\nWhat {} is this?"), Turn("assistant", "A {red} fox."))
    sample = Sample("a", ("a.png",), turns, "x")
    encoded = encode_sample(sample, tokenizer, get_template(template), num_patches=3)
    prompt = encode_prompt(turns[:1], tokenizer, get_template(template), num_patches=3)
    first_supervised = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert first_supervised == len(prompt)
    assert list(encoded.input_ids[:first_supervised]) == prompt
    assert prompt.count(-200) == 3


def test_what_a_published_folder_states_is_kept(tmp_path):
    config = VICUNA_CONFIG | {"chat_template": "{{ messages }}"}
    tokenizer = load_tokenizer(str(_write_vicuna(tmp_path / "a", tokenizer_config=config,
                                                 added_tokens={"[END]": 32001, "[PAD]": 32000})))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (1, 2, "<unk>")
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 4096)
    assert tokenizer.chat_template == "{{ messages }}"
    assert (len(tokenizer), tokenizer.convert_tokens_to_ids("[PAD]")) == (32002, 32000)
    assert tokenizer("a [PAD]b").input_ids[-2] == 32000
    padded = load_tokenizer(str(_write_vicuna(
        tmp_path / "b", special_tokens_map={"pad_token": "[PAD]"},
        tokenizer_config=VICUNA_CONFIG | {"added_tokens_decoder": {"2": {"content": "</s>"},
                                                                   "32000": {"content": "[PAD]"}}})))
    assert (padded.pad_token_id, len(padded)) == (32000, 32001)


def test_added_tokens_that_leave_a_gap_are_refused(tmp_path):
    folder = _write_vicuna(tmp_path / "gap", added_tokens={"[PAD]": 32007})
    with pytest.raises(ConfigError, match=r"gap: the added token '\[PAD\]' shall have id 32007 but gets 32000"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "unigram"}, False),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, False),
        ({"model_type": "bpe", "add_dummy_prefix": False}, False),
        ({"model_type": "bpe"}, True),
    ],
)
def test_only_models_like_llamas_are_built_here(tmp_path, settings, expected):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | settings,
        sentence_iterator=iter(["a red fox ran", "what is this?", "hello world"] * 5), model_writer=model,
        vocab_size=60, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.getvalue())
    assert is_llama_like(file) == expected
