"""The kinds of samples that a language model writes (paper, section 3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a kind shows the model, and what its replies must look like.

    ``share`` is the paper's thousands of samples. ``sees_boxes``: the boxes stand below the captions. ``asks``: the
    reply holds questions with their answers; without it, it is the answer to a detailed instruction. ``num_pairs``,
    ``question_words`` and ``answer_words`` are bounds, both included. ``max_tokens`` is the longest reply.
    """

    name: str
    share: int
    sees_boxes: bool
    asks: bool
    num_pairs: tuple[int, int]
    question_words: tuple[int, int]
    answer_words: tuple[int, int]
    max_tokens: int


KINDS = {
    kind.name: kind
    for kind in (
        Kind("conversation", 58, False, True, (2, 12), (2, 60), (1, 150), 800),
        Kind("detail", 23, True, False, (1, 1), (0, 60), (25, 400), 600),
        Kind("complex", 77, True, True, (1, 1), (3, 80), (25, 400), 700),
    )
}
"""By name, in the order in which the samples of an image stand in the output."""
