"""The stream of micro-batches of one rank, in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from llava_ds.data.collator import Collator
from llava_ds.data.dataset import LlavaDataset
from llava_ds.data.sampler import BatchSizes, Slot, plan_run
from llava_ds.schema import Batch


class _RankBatches(torch.utils.data.Sampler[list[Slot]]):
    """Lists of slots for one rank, micro-batch after micro-batch."""

    def __init__(self, lengths: list[int], seed: int, num_steps: int, batch: BatchSizes, rank: int) -> None:
        self.args = (lengths, seed, num_steps, batch)
        self.rank = rank

    def __iter__(self) -> Iterator[list[Slot]]:
        for plan in plan_run(*self.args):
            for row in plan.micro_batches:
                yield list(row[self.rank])


def build_loader(
    dataset: LlavaDataset,
    collator: Collator,
    lengths: list[int],
    seed: int,
    num_steps: int,
    batch: BatchSizes,
    rank: int,
    num_workers: int,
) -> torch.utils.data.DataLoader[Batch]:
    """Micro-batches of a rank for a whole run. The number of workers changes nothing but the speed."""
    options: dict[str, Any] = {}
    if num_workers:
        options = {"persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": "fork"}
    return torch.utils.data.DataLoader(
        cast(Any, dataset),  # batches of examples become Batch in the collator
        batch_sampler=_RankBatches(lengths, seed, num_steps, batch, rank),
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        **options,
    )
