"""What the model will see of a sample: as plain data, and as coloured text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from llava_ds.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ds.data.source import Source
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError
from llava_ds.schema import EncodedSample

_SUPERVISED, _IMAGE, _FADED, _ERROR, _RESET = "\033[32;1m", "\033[35m", "\033[2m", "\033[31m", "\033[0m"


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


def render_sample(source: Source, index: int, text: TextPipeline, epoch: int) -> str:
    """The text of a record for a terminal: supervised tokens in bold green, images by their slots, all else as it is.

    The first line counts tokens, supervised tokens, images and turns that were cut; a bad record gives its error.
    """
    try:
        sample = source[index]
        encoded = text.encode(sample, epoch)
    except DataError as error:
        return f"{_ERROR}{error}{_RESET}"
    facts = [
        f"{len(encoded.input_ids)} tokens", f"{encoded.num_supervised} supervised", f"{len(encoded.images)} image(s)"
    ]
    if encoded.images:
        facts.append(f"first image {_placement(encoded)}")
    if encoded.num_cut_turns:
        facts.append(f"{_ERROR}{encoded.num_cut_turns} turns cut at the end{_RESET}")
    body = "".join(_coloured(encoded, text.tokenizer))
    return f"{_FADED}{sample.where()}: {_RESET}{', '.join(facts)}\n{body}"


def _placement(encoded: EncodedSample) -> str:
    first_answer = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    place = encoded.input_ids.index(IMAGE_TOKEN_INDEX)
    return f"at token {place} of {first_answer} before the answer"


def _coloured(encoded: EncodedSample, tokenizer: Any) -> Iterator[str]:
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
            yield f"{_IMAGE}[image: {size} slots]{_RESET}"
        elif kind == "supervised":
            yield f"{_SUPERVISED}{_decode(ids, tokenizer)}{_RESET}"
        else:
            yield _decode(ids, tokenizer)


def _decode(ids: tuple[int, ...], tokenizer: Any) -> str:
    """The text of the ids as it stands within a longer one: a SentencePiece decoder drops the first space."""
    return "".join(
        token if token in tokenizer.all_special_tokens else part
        for token, part in _token_texts(ids, tokenizer)
    )


def _token_texts(ids: tuple[int, ...], tokenizer: Any) -> Iterator[tuple[str, str]]:
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    special = set(tokenizer.all_special_tokens)
    run: list[str] = []
    for token in [*tokens, None]:
        if token is not None and token not in special:
            run.append(token)
            continue
        if run:
            text = tokenizer.convert_tokens_to_string(run)
            yield "", " " + text if run[0].startswith("▁") and not text.startswith(" ") else text
            run = []
        if token is not None:
            yield token, token
