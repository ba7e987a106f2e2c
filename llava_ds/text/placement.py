"""Where images stand: before or after the question (paper, equation 4)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.errors import DataError
from llava_ds.schema import Sample, Turn

_ODD = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio, as splitmix64 (Steele, Lea, Flood 2014) steps


def apply_placement(sample: Sample, mode: str, seed: int, epoch: int) -> Sample:
    """The sample with its images placed.

    ``as_data`` changes nothing. ``front`` puts the images of every question before it, as the released code does.
    ``random`` puts those of the first question before or after it, with equal chance, as a pure function of (seed,
    epoch, sample id): no worker count and no resume changes it. Later turns stay as they are.

    Raises DataError, naming the record, when a placeholder taken out leaves another one behind.
    """
    if mode == "as_data":
        return sample
    if mode == "front":
        turns = tuple(_placed(sample, turn, True) if turn.role == "user" else turn for turn in sample.turns)
        return replace(sample, turns=turns)
    return place_first_images(sample, bool(is_image_first(seed, epoch, sample_key(sample.id))))


def place_first_images(sample: Sample, image_first: bool) -> Sample:
    """The sample with the images of its first user turn before the question, or after it."""
    number = next((n for n, turn in enumerate(sample.turns) if turn.role == "user"), None)
    if number is None:
        return sample
    placed = _placed(sample, sample.turns[number], image_first)
    return replace(sample, turns=(*sample.turns[:number], placed, *sample.turns[number + 1 :]))


def _placed(sample: Sample, turn: Turn, image_first: bool) -> Turn:
    num_images = turn.text.count(IMAGE_PLACEHOLDER)
    if num_images == 0:
        return turn
    question = turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
    if IMAGE_PLACEHOLDER in question:  # of <im<image>age>
        raise DataError(
            f"{sample.where()}: without its '{IMAGE_PLACEHOLDER}' the question reads '{IMAGE_PLACEHOLDER}' again; fix "
            "the record",
            reason=f"'{IMAGE_PLACEHOLDER}' within '{IMAGE_PLACEHOLDER}'",
        )
    images = "\n".join([IMAGE_PLACEHOLDER] * num_images)
    ordered = (images, question) if image_first else (question, images)
    return replace(turn, text="\n".join(part for part in ordered if part))


def place_images(question: str, num_images: int) -> str:
    """A question with its images in front of it, unless it places them itself with ``<image>``."""
    if IMAGE_PLACEHOLDER in question:
        return question
    return f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def sample_key(sample_id: str) -> int:
    """64 bits that stand for an id in random choices about its sample."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")


def is_image_first(seed: int, epoch: Any, keys: Any) -> Any:
    """The coin of ``random`` placement, for one ``sample_key`` or arrays of keys [n] and of epochs [n].

    The same bits on every machine.
    """
    return (random_words(seed, epoch, keys) >> np.uint64(63)) == 0


def random_words(seed: int, stream: Any, keys: Any) -> Any:
    """64 random bits each for arrays of ``sample_key``s [n] and of streams [n] (or one): a function of (seed, stream,
    key), by one round of splitmix64 over (seed, stream) and one over the key."""
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(seed % 2**64) * _ODD + np.asarray(stream, dtype=np.uint64))
        return _mix(start ^ np.asarray(keys, dtype=np.uint64))


def _mix(state: Any) -> Any:
    state = state + _ODD
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
