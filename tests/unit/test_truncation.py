"""Every policy at and around the limit; images count; what is cut is whole rounds, and is said."""

import pytest

from llava_ds.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.build import load_tokenizer
from llava_ds.schema import Sample, Turn
from llava_ds.text.encode import TOO_LONG, encode_sample
from llava_ds.text.templates import get_template
from llava_ds.text.truncation import NOTHING_LEFT, encode_within
from tests.helpers.tiny import write_llm

NUM_PATCHES = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(write_llm(tmp_path_factory.mktemp("truncation") / "llm")))


def _sample(num_rounds: int, image_rounds: tuple[int, ...] = (0,)) -> Sample:
    turns, images = [], []
    for number in range(num_rounds):
        image = "<image>\n" if number in image_rounds else ""
        images += [f"{number}.png"] if image else []
        turns += [Turn("user", f"{image}Where is {number}?"), Turn("assistant", f"on the left {number}")]
    return Sample("long", tuple(images), tuple(turns), "train.json[3]")


def _cut(sample, tokenizer, limit, policy, template="short"):
    return encode_within(sample, tokenizer, get_template(template), NUM_PATCHES, limit, policy)


@pytest.mark.parametrize("template", ["short", "v0", "v1", "llava_llama_2", "mistral", "mpt"])
@pytest.mark.parametrize("num_rounds", [1, 2, 3, 7])
def test_the_longest_beginning_of_whole_rounds_is_kept(tokenizer, template, num_rounds):
    sample = _sample(num_rounds, (0, 2))
    lengths = []
    for kept in range(1, num_rounds + 1):
        beginning = _sample(kept, (0, 2))
        lengths.append(len(encode_sample(beginning, tokenizer, get_template(template), NUM_PATCHES).input_ids))
    assert lengths == sorted(set(lengths))
    for limit in range(lengths[0], lengths[-1] + 2):
        kept = sum(length <= limit for length in lengths)
        encoded = _cut(sample, tokenizer, limit, "drop_last_turns", template)
        whole = encode_sample(_sample(kept, (0, 2)), tokenizer, get_template(template), NUM_PATCHES)
        assert (encoded.input_ids, encoded.labels) == (whole.input_ids, whole.labels)
        assert encoded.num_cut_turns == 2 * (num_rounds - kept)
        assert encoded.images == whole.images == ("0.png", "2.png")[: 1 if kept < 3 else 2]
        assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == NUM_PATCHES * len(encoded.images)


def test_a_first_round_that_does_not_fit_is_refused_with_both_lengths(tokenizer):
    sample = _sample(3)
    first = len(encode_sample(_sample(1), tokenizer, get_template("short"), NUM_PATCHES).input_ids)
    with pytest.raises(DataError, match=rf"train.json\[3\] id='long'.*{first} tokens .*{first - 1}") as caught:
        _cut(sample, tokenizer, first - 1, "drop_last_turns")
    assert caught.value.reason == TOO_LONG


@pytest.mark.parametrize("policy", ["error", "drop_sample"])
def test_whole_samples_only(tokenizer, policy):
    sample = _sample(3)
    length = len(encode_sample(sample, tokenizer, get_template("short"), NUM_PATCHES).input_ids)
    assert len(_cut(sample, tokenizer, length, policy).input_ids) == length
    with pytest.raises(DataError, match=f"{length} tokens .*the limit is {length - 1}") as caught:
        _cut(sample, tokenizer, length - 1, policy)
    assert caught.value.reason == TOO_LONG


def test_none_cuts_nothing(tokenizer):
    sample = _sample(3)
    whole = encode_sample(sample, tokenizer, get_template("short"), NUM_PATCHES)
    assert _cut(sample, tokenizer, 2, "none") == whole


def test_official_cuts_text_hard_and_images_never(tokenizer):
    with_image, text = _sample(3), _sample(3, ())
    whole = encode_sample(text, tokenizer, get_template("short"), NUM_PATCHES)
    assert _cut(with_image, tokenizer, 20, "official").input_ids == encode_sample(
        with_image, tokenizer, get_template("short"), NUM_PATCHES
    ).input_ids
    cut = _cut(text, tokenizer, 20, "official")
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:20], whole.labels[:20])


def test_nothing_is_trained_on_unseen(tokenizer):
    text = _sample(2, ())
    whole = encode_sample(text, tokenizer, get_template("short"), NUM_PATCHES)
    first_answer = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    with pytest.raises(DataError, match="no supervised token is left") as caught:
        _cut(text, tokenizer, first_answer, "official")
    assert caught.value.reason == NOTHING_LEFT
    assert _cut(text, tokenizer, first_answer + 1, "official").num_supervised == 1


def test_official_v0_widens_images_and_never_supervises_them(tokenizer):
    sample = _sample(3, (0, 1, 2))
    ids = encode_sample(sample, tokenizer, get_template("v0"), NUM_PATCHES).input_ids
    encoded = _cut(sample, tokenizer, 999, "official", "v0")
    assert encoded.input_ids == ids
    assert all(label != i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if i == IMAGE_TOKEN_INDEX)


def test_an_unknown_policy_lists_the_known_ones(tokenizer):
    with pytest.raises(ConfigError, match="known: error, drop_sample, drop_last_turns, official, none"):
        _cut(_sample(1), tokenizer, 99, "cut")
