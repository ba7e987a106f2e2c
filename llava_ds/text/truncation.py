"""What becomes of a sample that is longer than the limit: decided once, and here only; images count as their patches.

``error`` refuses it, ``drop_sample`` leaves it out (callers count it), ``drop_last_turns`` keeps as many whole rounds
from the beginning as fit. ``official`` and ``none`` are for comparison with the released code only.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import EncodedSample, Sample
from llava_ds.text.encode import encode_sample, encode_turns_of, rounds_of, too_long
from llava_ds.text.official import encode_official
from llava_ds.text.templates import AnyTemplate

NOTHING_LEFT = "no supervised token is left"

Truncation = Literal["error", "drop_sample", "drop_last_turns", "official", "none"]


def encode_within(
    sample: Sample, tokenizer: Any, template: AnyTemplate, num_patches: int, max_length: int, truncation: str
) -> EncodedSample:
    """Ids and labels of a sample, cut to ``max_length`` by the policy ``truncation``.

    Raises DataError, naming the record, when it is wrong in itself, when the policy does not let it fit (with the
    reason ``encode.TOO_LONG``), or when no supervised token is left.
    """
    if truncation not in get_args(Truncation):
        raise ConfigError(f"unknown truncation {truncation!r}; known: {', '.join(get_args(Truncation))}")
    if truncation == "official":
        encoded = encode_official(sample, tokenizer, template, num_patches, max_length)
    else:
        encoded = encode_sample(sample, tokenizer, template, num_patches)
        if truncation != "none" and len(encoded.input_ids) > max_length:
            if truncation != "drop_last_turns":
                raise too_long(sample, len(encoded.input_ids), max_length)
            encoded = _keep_first_rounds(encoded, sample, tokenizer, template, num_patches, max_length)
    if encoded.num_supervised == 0:
        raise DataError(
            f"{sample.where()}: no supervised token is left of it within {max_length} tokens; the loss would read "
            "nothing.\n  Raise the limit, or shorten the question.",
            reason=NOTHING_LEFT,
        )
    return encoded


def _keep_first_rounds(
    whole: EncodedSample, sample: Sample, tokenizer: Any, template: AnyTemplate, num_patches: int, max_length: int
) -> EncodedSample:
    """The longest beginning of whole rounds that fits; with the images of those rounds only."""
    turns = rounds_of(sample, template)

    def encode(num_rounds: int) -> tuple[list[int], list[int]]:
        return encode_turns_of(sample, turns[: 2 * num_rounds], tokenizer, template, num_patches)

    fits, too_many = 0, len(turns) // 2
    best: tuple[list[int], list[int]] = ([], [])
    while too_many - fits > 1 or fits == 0:
        middle = max(1, (fits + too_many) // 2)
        ids, labels = encode(middle)
        if len(ids) <= max_length:
            fits, best = middle, (ids, labels)
        elif middle == 1:
            raise too_long(sample, len(ids), max_length)
        else:
            too_many = middle
    kept = turns[: 2 * fits]
    num_images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in kept if turn.role == "user")
    return EncodedSample(
        sample.id, sample.images[:num_images], tuple(best[0]), tuple(best[1]),
        num_cut_turns=len(turns) - len(kept), num_cut_tokens=len(whole.input_ids) - len(best[0]),
    )
