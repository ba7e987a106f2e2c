"""Random choices of tokens, each row of a batch with random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from llava_ds.text.placement import sample_key


class RowSampling(LogitsProcessor):
    """Makes greedy search draw: the largest of logits plus Gumbel noise is a draw from their softmax.

    The noise of a row is a pure function of seed and id, so an answer does not depend on the batch or the rank that it
    falls into.
    """

    def __init__(self, ids: Sequence[str], seed: int, temperature: float, top_p: float) -> None:
        self._generators = [torch.Generator().manual_seed(sample_key(f"{seed}|{one}")) for one in ids]
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[B, V] -> [B, V]."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        waits = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=one) for one in self._generators])
        return scores.float() - waits.to(scores.device).log()
