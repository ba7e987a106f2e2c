"""What the released code makes of a sample, for comparison: its cut, and its masks of the v0 template.

Text-only samples are cut hard at the limit, samples with images not at all (its collator cuts those before the images
are spliced in, so the limit counts text). Its v0 masks count the bos token once a turn: they drift by one token a turn,
and supervise the ``###`` and role names that begin a turn (haotian-liu/LLaVA c121f04, ``_mask_targets``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llava_ds.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ds.schema import EncodedSample, Sample, Turn
from llava_ds.text.encode import check_images, encode_pieces, encode_sample
from llava_ds.text.templates import START, AnyTemplate, Piece, Special, get_template, text_with_images

_V0 = get_template("v0")
_V0_NAMES = {"user": "Human", "assistant": "Assistant"}


def encode_official(
    sample: Sample, tokenizer: Any, template: AnyTemplate, num_patches: int, max_length: int
) -> EncodedSample:
    """Ids and labels as the released code has them.

    Raises DataError as ``encode_sample`` does; with v0, where any order of roles is trained on, for images only.
    """
    if template is _V0:
        check_images(sample)
        ids, labels = _encode_v0(sample.turns, tokenizer)
        ids, labels = _widen_images(ids, labels, num_patches)
        encoded = EncodedSample(sample.id, sample.images, tuple(ids), tuple(labels))
    else:
        encoded = encode_sample(sample, tokenizer, template, num_patches)
    if sample.images:
        return encoded
    num_cut = max(0, len(encoded.input_ids) - max_length)
    return EncodedSample(
        sample.id, (), encoded.input_ids[:max_length], encoded.labels[:max_length], num_cut_tokens=num_cut
    )


def _encode_v0(turns: Sequence[Turn], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Any order of roles, each image as one position."""
    header = str(_V0.begin[0]).removesuffix("###")
    texts = [f"### {_V0_NAMES[turn.role]}: {turn.text}\n" for turn in turns]

    def tokenize(text: str) -> list[int]:
        return encode_pieces(_pieces(text), tokenizer, 1)[0]

    ids = tokenize(header + "".join(texts) + "### ")
    labels = list(ids)
    position = len(tokenize(header))
    labels[:position] = [IGNORE_INDEX] * position
    for turn, text in zip(turns, texts, strict=True):
        end = position + len(tokenize(text))  # counts a bos that is not there
        if turn.role == "user":
            masked = slice(position + 2, min(end, len(labels)))
            labels[masked] = [IGNORE_INDEX] * len(labels[masked])
        position = end
    return ids, [IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else label for i, label in zip(ids, labels, strict=True)]


def _pieces(text: str) -> Iterator[Piece]:
    yield Piece(Special(START))
    yield from text_with_images(text)


def _widen_images(ids: Sequence[int], labels: Sequence[int], num_patches: int) -> tuple[list[int], list[int]]:
    widths = [num_patches if i == IMAGE_TOKEN_INDEX else 1 for i in ids]
    return (
        [i for i, width in zip(ids, widths, strict=True) for _ in range(width)],
        [label for label, width in zip(labels, widths, strict=True) for _ in range(width)],
    )
