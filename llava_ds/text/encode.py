"""From a conversation to ids and labels, both from one call, so that they cannot drift apart.

Text is tokenized in runs between special tokens and images, never turn by turn, so the ids are those of the whole
text. A label is given by where a token stands in that text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ds.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import EncodedSample, Sample, Turn
from llava_ds.text.templates import BOS, EOS, Special, Template

# Stands before a run of text while it is tokenized. A newline merges with nothing in a SentencePiece model.
_ANCHOR = "\n"


@dataclass(frozen=True)
class _Image:
    pass


@dataclass(frozen=True)
class _Piece:
    content: str | Special | _Image
    supervised: bool


def encode_sample(
    sample: Sample, tokenizer: Any, template: Template, num_patches: int, max_length: int
) -> EncodedSample:
    """Ids and labels of a whole conversation; each image takes ``num_patches`` positions.

    Raises DataError, naming the record, when it is longer than ``max_length``, has an empty answer, or its
    ``<image>`` placeholders do not match its images.
    """
    _check_images(sample)
    _check_turns(sample, template)
    ids, labels = _encode_pieces(list(_pieces(sample.turns, template)), tokenizer, num_patches)
    if len(ids) > max_length:
        raise DataError(
            f"{sample.where()}: longer than data.max_length: {len(ids)} tokens (images counted), the limit is "
            f"{max_length}.\n  Raise the limit, shorten the record, or set data.on_bad_sample=skip.",
            reason="longer than data.max_length",
        )
    return EncodedSample(sample.id, sample.images, tuple(ids), tuple(labels))


def encode_prompt(turns: Sequence[Turn], tokenizer: Any, template: Template, num_patches: int) -> list[int]:
    """Ids of a conversation that ends in a user turn, up to where the assistant's answer begins."""
    pieces = list(_pieces(turns, template, open_ended=True))
    return _encode_pieces(pieces, tokenizer, num_patches)[0]


def stop_string(template: Template) -> str | None:
    """The text that ends an answer, or None where the end-of-sequence token does."""
    return template.stop if isinstance(template.stop, str) else None


def _pieces(turns: Sequence[Turn], template: Template, open_ended: bool = False) -> Iterator[_Piece]:
    yield _Piece(Special(BOS), False)
    yield from (_Piece(part, False) for part in template.begin)
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            yield _Piece(template.answer.replace("{}", turn.text), True)
            yield _Piece(template.stop, True)
            continue
        if number:
            yield from (_Piece(part, False) for part in template.between)
        yield from _user_pieces(turn.text, template)
        yield _Piece(template.assistant, False)
    if not open_ended:
        yield _Piece(template.end, False)


def _user_pieces(text: str, template: Template) -> Iterator[_Piece]:
    if template.drops_question:
        yield from (_Piece(_Image(), False) for _ in range(text.count(IMAGE_PLACEHOLDER)))
        return
    # The text is put into the pattern after the split, so that braces in it stay text.
    before, after = template.user.split("{}")
    chunks = text.split(IMAGE_PLACEHOLDER)
    chunks[0] = before + chunks[0]
    chunks[-1] += after
    for number, chunk in enumerate(chunks):
        if number:
            yield _Piece(_Image(), False)
        yield _Piece(chunk, False)


def _encode_pieces(pieces: Sequence[_Piece], tokenizer: Any, num_patches: int) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []

    def extend(new_ids: Sequence[int], supervised: Sequence[bool]) -> None:
        ids.extend(new_ids)
        labels.extend(i if yes else IGNORE_INDEX for i, yes in zip(new_ids, supervised, strict=True))

    run: list[tuple[str, bool]] = []
    starts_chunk = True  # the beginning of the text, and after every image

    def flush() -> None:
        if run:
            extend(*_tokenize_run(run, tokenizer, starts_chunk))
        run.clear()

    for piece in pieces:
        if piece.content == "":
            continue
        if isinstance(piece.content, str):
            run.append((piece.content, piece.supervised))
            continue
        flush()
        if isinstance(piece.content, _Image):
            extend([IMAGE_TOKEN_INDEX] * num_patches, [False] * num_patches)
            starts_chunk = True
        else:
            special = _special_id(tokenizer, piece.content)
            if special is not None:
                extend([special], [piece.supervised])
            # SentencePiece puts its leading space at the beginning of a text only.
            starts_chunk = not ids or (starts_chunk and piece.content.kind == BOS)
    flush()
    return ids, labels


def _tokenize_run(
    run: Sequence[tuple[str, bool]], tokenizer: Any, starts_chunk: bool
) -> tuple[list[int], list[bool]]:
    """Ids of the joined texts, and for each whether it lies in a supervised one."""
    lead = ""
    if adds_leading_space(tokenizer):
        # The leading space is written out behind an anchor, because the fast tokenizer drops it before a text
        # that begins with a space itself, and adds it where a text goes on after a special token.
        lead = _ANCHOR + (" " if starts_chunk else "")
    text = lead + "".join(part for part, _ in run)
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    skip = len(tokenizer(_ANCHOR, add_special_tokens=False).input_ids) if lead else 0
    spans = _supervised_spans(run, len(lead))
    supervised = [
        any(begin < span_end and end > span_begin for span_begin, span_end in spans)
        for begin, end in encoded.offset_mapping[skip:]
    ]
    return encoded.input_ids[skip:], supervised


def _supervised_spans(run: Sequence[tuple[str, bool]], position: int) -> list[tuple[int, int]]:
    spans = []
    for number, (text, supervised) in enumerate(run):
        # The leading space belongs to the first text of a run.
        begin = 1 if number == 0 and position > 1 else position
        position += len(text)
        if supervised:
            spans.append((begin, position))
    return spans


def adds_leading_space(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with a space of its own, as SentencePiece models do."""
    known = getattr(tokenizer, "_llava_ds_adds_leading_space", None)
    if known is None:
        if not tokenizer.is_fast:
            raise ConfigError(f"the tokenizer {type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed")
        pieces = tokenizer.tokenize(_ANCHOR)
        known = bool(pieces) and pieces[0].startswith("▁")
        tokenizer._llava_ds_adds_leading_space = known
    return known


def _special_id(tokenizer: Any, special: Special) -> int | None:
    if special.kind == EOS:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the template ends answers with the tokenizer's eos token, but it has none")
        return int(tokenizer.eos_token_id)
    return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def _check_images(sample: Sample) -> None:
    num_placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns if turn.role == "user")
    if any(IMAGE_PLACEHOLDER in turn.text for turn in sample.turns if turn.role == "assistant"):
        raise DataError(
            f"{sample.where()}: '{IMAGE_PLACEHOLDER}' in an assistant's turn; it belongs into a question",
            reason=f"'{IMAGE_PLACEHOLDER}' in an assistant's turn",
        )
    if num_placeholders != len(sample.images):
        raise DataError(
            f"{sample.where()}: {num_placeholders} '{IMAGE_PLACEHOLDER}' placeholders but {len(sample.images)} "
            "image paths.\n  Each placeholder needs one entry in 'image'; fix the record, or skip such records with "
            "data.on_bad_sample=skip.",
            reason=f"'{IMAGE_PLACEHOLDER}' placeholders do not match the images",
        )


def _check_turns(sample: Sample, template: Template) -> None:
    roles = [turn.role for turn in sample.turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"{sample.where()}: turns must alternate human, gpt, ... and end with gpt; got {roles or 'none'}",
            reason="turns do not alternate human, gpt",
        )
    if not all(turn.text.strip() for turn in sample.turns if turn.role == "assistant"):
        raise DataError(
            f"{sample.where()}: an empty answer; there is nothing to learn from it", reason="an empty answer"
        )
    if template.drops_question and len(roles) != 2:
        raise DataError(
            f"{sample.where()}: template {template.name!r} takes one question and one answer, got {len(roles)} turns",
            reason=f"more than one round, template {template.name!r} takes one",
        )
