"""The stream of micro-batches of one rank, in the order of the plan."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llava_ds.data.collator import Collator
from llava_ds.data.dataset import Example, LlavaDataset
from llava_ds.data.sampler import Slot, StepPlan
from llava_ds.errors import DataError
from llava_ds.schema import Batch


class _RankBatches(torch.utils.data.Sampler[list[Slot]]):
    """Lists of slots for one rank, micro-batch after micro-batch."""

    def __init__(self, plans: Callable[[], Iterator[StepPlan]], rank: int) -> None:
        self.plans = plans
        self.rank = rank

    def __iter__(self) -> Iterator[list[Slot]]:
        for plan in self.plans():
            for row in plan.micro_batches:
                yield list(row[self.rank])


class _Caught(torch.utils.data.Dataset[Any]):
    """Hands over a DataError instead of raising it: a DataLoader worker would wrap it in its own traceback."""

    def __init__(self, dataset: LlavaDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, slot: Slot) -> Example | DataError:
        try:
            return self.dataset[slot]
        except DataError as error:
            return error


@dataclass(frozen=True)
class _CollateUnlessFailed:
    """The collator, or the first error among the examples."""

    collator: Collator

    def __call__(self, examples: list[Example | DataError]) -> Batch | DataError:
        good = [example for example in examples if isinstance(example, Example)]
        errors = [example for example in examples if isinstance(example, DataError)]
        return errors[0] if errors else self.collator(good)


@dataclass(frozen=True)
class BatchStream:
    """The micro-batches of a rank. Iterating raises DataError, in this process, for a sample that cannot be read."""

    loader: torch.utils.data.DataLoader[Any]

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    f"a worker of the data loader died: {error}\n"
                    "  Where memory ran out, lower data.num_workers or train.micro_batch_size."
                ) from error
            if isinstance(batch, DataError):
                raise batch
            yield batch


def _leave_signals_to_the_rank(_worker: int) -> None:
    """Slurm signals every process of a job. A worker that ends then would end its rank, before that has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    dataset: LlavaDataset,
    collator: Collator,
    plans: Callable[[], Iterator[StepPlan]],
    rank: int,
    num_workers: int,
) -> BatchStream:
    """The micro-batches of a rank, in the order of the plans. The number of workers changes nothing but the speed."""
    options: dict[str, Any] = {}
    if num_workers:
        options = {
            "persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": "fork",
            "worker_init_fn": _leave_signals_to_the_rank,
        }
    loader = torch.utils.data.DataLoader(
        _Caught(dataset),
        batch_sampler=_RankBatches(plans, rank),
        collate_fn=_CollateUnlessFailed(collator),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        **options,
    )
    return BatchStream(loader)
