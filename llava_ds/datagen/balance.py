"""The paper's filter of caption pairs: few of what is common, all of what is rare (section 4.1, for CC3M)."""

from __future__ import annotations

import random
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

MIN_FREQUENCY, MAX_PER_PHRASE = 3, 100
"""The paper's numbers."""


@dataclass(frozen=True)
class Balanced:
    """The numbers of the captions taken, rising, and the counts behind them."""

    captions: np.ndarray
    num_phrases: int
    num_phrases_kept: int
    num_phrases_cut: int
    num_without_phrase: int


def balance(
    phrases_of_captions: Iterable[Collection[str]],
    min_frequency: int = MIN_FREQUENCY,
    max_per_phrase: int = MAX_PER_PHRASE,
    seed: int = 0,
) -> Balanced:
    """All captions of the phrases that ``min_frequency`` or more hold, and of a phrase that more than
    ``max_per_phrase`` hold, that many drawn by (seed, phrase). A phrase counts once a caption.

    The paper goes from the rarest phrase up and draws from all captions of a phrase, taken or not: the union does not
    depend on the order. Takes 4 bytes for each phrase of a caption, and each phrase once.
    """
    captions_of: defaultdict[str, array[int]] = defaultdict(partial(array, "I"))
    num_captions = num_without_phrase = 0
    for phrases in phrases_of_captions:
        for phrase in set(phrases):
            captions_of[phrase].append(num_captions)
        num_captions += 1
        num_without_phrase += not phrases
    is_taken = np.zeros(num_captions, bool)
    frequencies = [len(captions) for captions in captions_of.values()]
    for phrase, captions in captions_of.items():
        if len(captions) < min_frequency:
            continue
        if len(captions) > max_per_phrase:
            is_taken[random.Random(f"{seed}|{phrase}").sample(captions, max_per_phrase)] = True
        else:
            is_taken[captions] = True
    return Balanced(
        np.flatnonzero(is_taken),
        len(frequencies),
        sum(frequency >= min_frequency for frequency in frequencies),
        sum(frequency > max_per_phrase for frequency in frequencies),
        num_without_phrase,
    )
