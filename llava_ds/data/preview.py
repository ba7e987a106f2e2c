"""What the model will see of a sample: as plain data, and as text with the supervised part set off."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llava_ds.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava_ds.data.sources.source import Source
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError
from llava_ds.schema import EncodedSample, Sample
from llava_ds.text.placement import apply_placement

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x80-\x9f]")


@dataclass(frozen=True)
class Paint:
    """How kinds of text are set off, each by what stands before and after it."""

    supervised: tuple[str, str]
    image: tuple[str, str]
    error: tuple[str, str]


COLOURS = Paint(("\033[32;1m", "\033[0m"), ("\033[35m", "\033[0m"), ("\033[31m", "\033[0m"))
MARKS = Paint(("[[", "]]"), ("", ""), ("", ""))


def sample_record(source: Source, index: int, text: TextPipeline, epoch: int) -> dict[str, Any]:
    """``{"id", "input_ids", "labels", "error"}`` of a record; of a bad one, ids and labels are None."""
    sample_id = None
    try:
        sample = source[index]
        sample_id = sample.id
        encoded = text.encode(sample, epoch)
    except DataError as error:
        known = sample_id if sample_id is not None else error.sample_id
        return {"id": known, "input_ids": None, "labels": None, "error": str(error)}
    return {"id": encoded.id, "input_ids": list(encoded.input_ids), "labels": list(encoded.labels), "error": None}


def render_sample(source: Source, index: int, text: TextPipeline, epoch: int, paint: Paint) -> str:
    """The text of a record: supervised tokens set off, images by their slots, all else as it is.

    The first line counts tokens, supervised tokens, images and what was cut; a bad record gives its error.
    """
    try:
        sample = source[index]
        encoded = text.encode(sample, epoch)
    except DataError as error:
        return _set_off(str(error), paint.error)
    facts = [f"{len(encoded.input_ids)} tokens", f"{encoded.num_supervised} supervised"]
    if encoded.images:
        facts.append(f"{len(encoded.images)} image(s), placement {text.placement}: {_order(sample, text, epoch)}")
    if encoded.num_cut_tokens:
        turns = f"{encoded.num_cut_turns} turns" if encoded.num_cut_turns else "the end"
        facts.append(_set_off(f"{turns} ({encoded.num_cut_tokens} tokens) cut", paint.error))
    return f"{sample.where()}: {', '.join(facts)}\n{''.join(_painted(encoded, text.tokenizer, paint))}"


def _order(sample: Sample, text: TextPipeline, epoch: int) -> str:
    placed = apply_placement(sample, text.placement, text.seed, epoch)
    question = next(turn.text for turn in placed.turns if IMAGE_PLACEHOLDER in turn.text)
    before, after = (bool(part.strip()) for part in question.split(IMAGE_PLACEHOLDER, 1))
    return "within the question" if before and after else "image last" if before else "image first"


def _painted(encoded: EncodedSample, tokenizer: Any, paint: Paint) -> Iterator[str]:
    kinds = [
        "image" if i == IMAGE_TOKEN_INDEX else "supervised" if label != IGNORE_INDEX else "context"
        for i, label in zip(encoded.input_ids, encoded.labels, strict=True)
    ]
    position = 0
    for kind, group in groupby(kinds):
        size = len(list(group))
        ids = encoded.input_ids[position : position + size]
        position += size
        if kind == "image":
            yield _set_off(f"[image: {size} slots]", paint.image)
        elif kind == "supervised":
            yield _set_off(_decode(ids, tokenizer), paint.supervised)
        else:
            yield _decode(ids, tokenizer)


def _set_off(text: str, around: tuple[str, str]) -> str:
    return f"{around[0]}{text}{around[1]}"


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of ids as it stands within a longer one; control characters are shown, not sent to the terminal."""
    special = set(tokenizer.all_special_tokens)
    text = ""
    for is_special, group in groupby(tokenizer.convert_ids_to_tokens(list(ids)), special.__contains__):
        tokens = list(group)
        if is_special:
            text += "".join(tokens)
            continue
        part = tokenizer.convert_tokens_to_string(tokens)
        # A SentencePiece decoder drops the first space.
        text += " " + part if tokens[0].startswith("▁") and not part.startswith(" ") else part
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)
