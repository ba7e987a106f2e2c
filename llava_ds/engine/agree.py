"""What the ranks tell each other about a step before any of them acts on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from llava_ds.distributed import Ranks, gather_objects
from llava_ds.errors import DataError
from llava_ds.schema import Batch


def next_batches(stream: Iterator[Batch], count: int) -> tuple[list[Batch], DataError | None]:
    """The micro-batches of a step, or what kept this rank from having them."""
    try:
        return [next(stream) for _ in range(count)], None
    except DataError as error:
        return [], error


def sum_over_ranks(totals: torch.Tensor, ranks: Ranks, device: torch.device) -> torch.Tensor:
    """The sum of every rank's numbers, on the CPU; summed on ``device``."""
    if ranks.world_size == 1:
        return totals.cpu()
    moved = totals.to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def raise_failure(ranks: Ranks, failure: DataError | None) -> None:
    """Raises DataError on all ranks, with the message of the first that has a failure; one has."""
    for rank, message in enumerate(gather_objects(ranks, failure and str(failure))):
        if message is not None:
            where = f"rank {rank}: " if ranks.world_size > 1 else ""
            raise DataError(where + message, on_every_rank=True) from failure


def too_many_bad(num_bad: int, num_seen: int, max_bad_frac: float) -> bool:
    """The first ten are let pass, so that an early one does not end a run that allows for some."""
    return num_bad > max(10 if max_bad_frac else 0, max_bad_frac * num_seen)


def check_planned(what: str, planned: int, found: int) -> None:
    """Raises DataError when the supervised tokens of all ranks, ``found``, are not those that were planned."""
    if planned != found:
        raise DataError(
            f"the {what} was planned with {planned} supervised tokens but has {found}: the data changed while it was "
            "being read, or after its lengths were kept.\n  Delete the folder 'lengths' in LLAVA_DS_CACHE (default "
            "~/.cache/llava_ds) and the data's .index file, and start again, with --resume.",
            on_every_rank=True,
        )
