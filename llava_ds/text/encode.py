"""From a conversation to ids and labels, both from one call, so that they cannot drift apart.

Text is tokenized in runs between special tokens and images, never turn by turn, so the ids are those of the whole
text. A label is given by where a token stands in that text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, processors

from llava_ds.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import EncodedSample, Sample, Turn
from llava_ds.text.templates import BOS, EOS, START, AnyTemplate, ImageSlot, Piece, Special

# Stands before a run of text while it is tokenized. A newline merges with nothing in a SentencePiece model.
_ANCHOR = "\n"


def encode_sample(sample: Sample, tokenizer: Any, template: AnyTemplate, num_patches: int) -> EncodedSample:
    """Ids and labels of a whole conversation of any length; each image takes ``num_patches`` positions.

    A leading answer is left out, as in the official code. Raises DataError, naming the record, when it has an empty
    answer, or its ``<image>`` placeholders do not match its images. See truncation.py for the limit.
    """
    turns = rounds_of(sample, template)
    check_images(sample)
    ids, labels = encode_turns_of(sample, turns, tokenizer, template, num_patches)
    return EncodedSample(sample.id, sample.images, tuple(ids), tuple(labels))


def encode_prompt(turns: Sequence[Turn], tokenizer: Any, template: AnyTemplate, num_patches: int) -> list[int]:
    """Ids of a conversation that ends in a user turn, up to where the assistant's answer begins."""
    return encode_turns(turns, tokenizer, template, num_patches, open_ended=True)[0]


def stop_string(tokenizer: Any, template: AnyTemplate) -> str | None:
    """The text that ends an answer, or None where a special token does."""
    if isinstance(template.stop, str):
        return template.stop
    return None if is_token(tokenizer, template.stop) else template.stop.kind


def stop_id(tokenizer: Any, template: AnyTemplate) -> int | None:
    """The special token that ends an answer; where a text does, the end-of-sequence token, if there is one."""
    if isinstance(template.stop, Special) and is_token(tokenizer, template.stop):
        return _special_id(tokenizer, template.stop)
    return tokenizer.eos_token_id


def is_token(tokenizer: Any, special: Special) -> bool:
    """Whether the tokenizer has the special token; else its string is text."""
    return _special_id(tokenizer, special) is not None


def encode_turns_of(
    sample: Sample, turns: Sequence[Turn], tokenizer: Any, template: AnyTemplate, num_patches: int
) -> tuple[list[int], list[int]]:
    """Ids and labels of some turns of a sample. Raises DataError, naming it, when the template refuses them."""
    try:
        return encode_turns(turns, tokenizer, template, num_patches)
    except DataError as error:
        raise DataError(f"{sample.where()}: {error}", error.reason, sample.id) from error


def encode_turns(
    turns: Sequence[Turn], tokenizer: Any, template: AnyTemplate, num_patches: int, open_ended: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and labels of turns as they are, unchecked."""
    space_inside = _facts(tokenizer).spaces_after_special if template.is_tokenizers_own else None
    return encode_pieces(template.pieces(turns, open_ended), tokenizer, num_patches, space_inside)


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: Any, num_patches: int, space_inside: bool | None = None
) -> tuple[list[int], list[int]]:
    """Ids and labels of the pieces in their order; each image is ``num_patches`` times ``IMAGE_TOKEN_INDEX``.

    ``space_inside``: whether the leading space (see ``adds_leading_space``) goes before every text behind a special
    token or an image; None is SentencePiece's way, behind images only.
    """
    ids: list[int] = []
    labels: list[int] = []
    run: list[tuple[str, bool]] = []
    starts_chunk = True  # the beginning of the text, and after every image

    def flush() -> None:
        if run:
            new_ids, supervised = _tokenize_run(run, tokenizer, starts_chunk)
            ids.extend(new_ids)
            labels.extend(i if yes else IGNORE_INDEX for i, yes in zip(new_ids, supervised, strict=True))
            run.clear()

    for piece in pieces:
        content = piece.content
        if content == "":
            continue
        special = _special_id(tokenizer, content) if isinstance(content, Special) else None
        if isinstance(content, Special) and special is None:
            if content.kind in (START, BOS):
                continue
            content = content.kind  # no token of this tokenizer: plain text
        if isinstance(content, str):
            run.append((content, piece.supervised))
            continue
        flush()
        if isinstance(content, ImageSlot):
            ids += [IMAGE_TOKEN_INDEX] * num_patches
            labels += [IGNORE_INDEX] * num_patches
            starts_chunk = space_inside is not False
        elif special is not None:
            # SentencePiece puts its leading space at the beginning of a text only.
            starts_chunk = bool(space_inside) or (starts_chunk and content.kind == START)
            ids.append(special)
            labels.append(special if piece.supervised else IGNORE_INDEX)
    flush()
    return ids, labels


def _tokenize_run(
    run: Sequence[tuple[str, bool]], tokenizer: Any, starts_chunk: bool
) -> tuple[list[int], list[bool]]:
    """Ids of the joined texts, and for each whether it lies in a supervised one."""
    facts = _facts(tokenizer)
    # The leading space is written out behind an anchor, because the fast tokenizer drops it before a text
    # that begins with a space itself, and adds it where a text goes on after a special token.
    lead = _ANCHOR + (" " if starts_chunk else "") if facts.adds_leading_space else ""
    encoded = _core(tokenizer).encode(lead + "".join(part for part, _ in run), add_special_tokens=False)
    skip = facts.anchor_length if lead else 0
    if skip and encoded.offsets[skip][0] < len(_ANCHOR):
        raise ConfigError(
            "the tokenizer joins a line break with the text that follows it, so texts cannot be encoded as in training "
            "of its LLM; give a LLaMA-like SentencePiece model or a byte-level tokenizer"
        )
    return encoded.ids[skip:], _supervised(encoded.offsets[skip:], run, len(lead))


def _supervised(
    offsets: Sequence[tuple[int, int]], run: Sequence[tuple[str, bool]], position: int
) -> list[bool]:
    """For each token whether it overlaps a supervised text; the texts follow one another from ``position`` on."""
    spans = []
    for number, (text, supervised) in enumerate(run):
        # The leading space belongs to the first text of a run.
        begin = 1 if number == 0 and position > 1 else position
        position += len(text)
        if supervised and text:
            spans.append((begin, position))
    if not spans:
        return [False] * len(offsets)
    found, current = [], 0
    for begin, end in offsets:
        while current < len(spans) - 1 and spans[current][1] <= begin:
            current += 1
        found.append(begin < spans[current][1] and end > spans[current][0])
    return found


def _core(tokenizer: Any) -> Any:
    """The Rust tokenizer, set so that special tokens in a text stay text, and nothing is cut or filled."""
    core = getattr(tokenizer, "_llava_ds_core", None)
    if core is None:
        core = tokenizer._llava_ds_core = _with_whole_offsets(tokenizer.backend_tokenizer)
    core.encode_special_tokens = True
    if core.truncation is not None:
        core.no_truncation()
    if core.padding is not None:
        core.no_padding()
    return core


def _with_whole_offsets(core: Any) -> Any:
    """The tokenizer itself, or a copy where its post-processor would count spaces out of the offsets of tokens."""
    if '"trim_offsets":true' not in core.to_str():
        return core
    copy = Tokenizer.from_str(core.to_str())
    copy.post_processor = processors.ByteLevel(trim_offsets=False)  # texts are encoded without special tokens
    return copy


@dataclass(frozen=True)
class _Facts:
    adds_leading_space: bool
    anchor_length: int
    begins_with_bos: bool
    spaces_after_special: bool


def _facts(tokenizer: Any) -> _Facts:
    known = getattr(tokenizer, "_llava_ds_facts", None)
    if known is None:
        if not tokenizer.is_fast:
            raise ConfigError(f"the tokenizer {type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed")
        anchor = _core(tokenizer).encode(_ANCHOR, add_special_tokens=False).tokens
        leading_space = bool(anchor) and anchor[0].startswith("▁")
        # SentencePiece models are made to begin with bos, whatever their tokenizer.json says.
        with_bos = leading_space or tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        known = tokenizer._llava_ds_facts = _Facts(
            leading_space, len(anchor), with_bos, leading_space and _spaces_after_special(tokenizer)
        )
    return known


def _spaces_after_special(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its leading space behind special tokens, too (the first LLaMA models' does)."""
    if tokenizer.eos_token is None:
        return False
    tokens = tokenizer.tokenize(f"{tokenizer.eos_token}a")
    return len(tokens) > 1 and tokens[0] == tokenizer.eos_token and tokens[1].startswith("▁")


def adds_leading_space(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with a space of its own, as SentencePiece models do."""
    return _facts(tokenizer).adds_leading_space


def spaces_after_special(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts that space behind special tokens, too."""
    return _facts(tokenizer).spaces_after_special


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a text begins with the tokenizer's bos token."""
    return tokenizer.bos_token_id is not None and _facts(tokenizer).begins_with_bos


def _special_id(tokenizer: Any, special: Special) -> int | None:
    """The id, or None where the tokenizer has no such token (or does not begin texts with it)."""
    if special.kind == EOS:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the template ends answers with the tokenizer's eos token, but it has none")
        return int(tokenizer.eos_token_id)
    if special.kind == START:
        return int(tokenizer.bos_token_id) if begins_with_bos(tokenizer) else None
    if special.kind == BOS:
        return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    return tokenizer.backend_tokenizer.token_to_id(special.kind)


def rounds_of(sample: Sample, template: AnyTemplate) -> tuple[Turn, ...]:
    """The turns from the first question on, checked: question and answer in turn, and no answer empty.

    Raises DataError that names the record.
    """
    turns = sample.turns[1:] if sample.turns and sample.turns[0].role == "assistant" else sample.turns
    roles = [turn.role for turn in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"{sample.where()}: turns must alternate human, gpt, ... and end with gpt; got "
            f"{[turn.role for turn in sample.turns] or 'none'}",
            reason="turns do not alternate human, gpt",
        )
    if not all(turn.text for turn in turns if turn.role == "assistant"):
        raise DataError(
            f"{sample.where()}: an empty answer; there is nothing to learn from it", reason="an empty answer"
        )
    if template.drops_question and len(roles) != 2:
        raise DataError(
            f"{sample.where()}: template {template.name!r} takes one question and one answer, got {len(roles)} turns",
            reason=f"more than one round, template {template.name!r} takes one",
        )
    if template.drops_question and IMAGE_PLACEHOLDER not in turns[0].text:
        raise DataError(
            f"{sample.where()}: template {template.name!r} keeps only the images of a question, and it has none",
            reason=f"no image, template {template.name!r} needs one",
        )
    return turns


def check_images(sample: Sample) -> None:
    """Raises DataError, naming the record, unless its questions hold one placeholder for each image."""
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


TOO_LONG = "longer than data.max_length"


def too_long(sample: Sample, num_tokens: int, max_length: int) -> DataError:
    """The error for a sample that does not fit."""
    return DataError(
        f"{sample.where()}: longer than data.max_length: {num_tokens} tokens (images counted), the limit is "
        f"{max_length}.\n  Raise the limit, shorten the record, or set data.truncation.",
        reason=TOO_LONG,
    )
