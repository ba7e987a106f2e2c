"""The paper's filter of caption pairs: few of what is common, all of what is rare (section 4.1, for CC3M)."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_FREQUENCY, MAX_PER_PHRASE = 3, 100
"""The paper's numbers."""


@dataclass(frozen=True)
class PhraseTable:
    """Which captions hold which phrases: ``captions[bounds[p] : bounds[p + 1]]`` are those of phrase ``p``, in order.

    8 bytes for each phrase of a caption while it is built, 4 after, and the phrases themselves once.
    """

    phrases: Sequence[str]
    bounds: np.ndarray  # [num_phrases + 1]
    captions: np.ndarray  # [sum of frequencies], numbers of captions
    num_captions: int


@dataclass(frozen=True)
class Balanced:
    """The numbers of the captions taken, rising, and the counts behind them."""

    captions: np.ndarray
    num_phrases: int
    num_phrases_kept: int
    num_phrases_cut: int
    num_without_phrase: int


def build_table(phrases_of_captions: Iterable[Iterable[str]]) -> PhraseTable:
    """The table of captions in their order. A phrase counts once a caption."""
    numbers: dict[str, int] = {}
    phrase_ids, captions = array("I"), array("I")
    num_captions = 0
    for caption, phrases in enumerate(phrases_of_captions):
        for phrase in set(phrases):
            phrase_ids.append(numbers.setdefault(phrase, len(numbers)))
            captions.append(caption)
        num_captions += 1
    ids = np.frombuffer(phrase_ids, np.uint32) if phrase_ids else np.zeros(0, np.uint32)
    order = np.argsort(ids, kind="stable")
    bounds = np.concatenate(([0], np.cumsum(np.bincount(ids, minlength=len(numbers)))))
    by_phrase = np.frombuffer(captions, np.uint32)[order] if captions else np.zeros(0, np.uint32)
    return PhraseTable(list(numbers), bounds, by_phrase, num_captions)


def balance(
    table: PhraseTable, min_frequency: int = MIN_FREQUENCY, max_per_phrase: int = MAX_PER_PHRASE, seed: int = 0
) -> Balanced:
    """All captions of the phrases that ``min_frequency`` or more hold, and of a phrase that more than
    ``max_per_phrase`` hold, that many drawn by (seed, phrase).

    The paper goes from the rarest phrase up and draws from all captions of a phrase, taken or not: the union does not
    depend on the order.
    """
    is_taken = np.zeros(table.num_captions, bool)
    frequencies = np.diff(table.bounds)
    kept = np.flatnonzero(frequencies >= min_frequency)
    for phrase in kept.tolist():
        captions = table.captions[table.bounds[phrase] : table.bounds[phrase + 1]]
        if len(captions) > max_per_phrase:
            draw = random.Random(f"{seed}|{table.phrases[phrase]}").sample(range(len(captions)), max_per_phrase)
            captions = captions[draw]
        is_taken[captions] = True
    num_with_phrase = len(np.unique(table.captions))
    return Balanced(
        np.flatnonzero(is_taken),
        len(frequencies),
        len(kept),
        int((frequencies > max_per_phrase).sum()),
        table.num_captions - num_with_phrase,
    )
