"""The one training loop. A stage is data: a freeze table, learning rates, a template, a data set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from llava_ds.data.sampler import START, DataState, StepPlan
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Batch


class Tracker(Protocol):
    """Where the numbers of a step go."""

    def log(self, record: dict[str, Any]) -> None:
        """Takes one step's numbers."""

    def close(self) -> None:
        """Ends the run."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop must know of the run."""

    world_size: int
    grad_accum_steps: int
    """Of a whole step, as DeepSpeed was told; a step may take more (``train.micro_batch_tokens``) or fewer."""
    loss_averaging: str
    save_steps: int | None
    device: torch.device
    max_bad_frac: float = 0.0


@dataclass
class Progress:
    """Where training stands after a step."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    loss: float = float("nan")
    bad_samples: int = 0
    """Samples seen whose picture was bad (``data.on_bad_sample=skip``)."""
    data_state: DataState = START
    """Where the data goes on after this step."""


def train(
    engine: Any,
    batches: Iterable[Batch],
    plans: Iterable[StepPlan],
    supervised_tokens: Callable[[StepPlan], int],
    settings: LoopSettings,
    trackers: list[Tracker],
    save: Callable[[Progress], None],
) -> Progress:
    """Runs every planned step and saves at the end (and every ``save_steps``).

    The loss of a step is the sum over its supervised tokens divided by their number over all ranks and
    micro-batches, so its gradients do not depend on how the step is split; with ``per_micro_batch`` every
    micro-batch of every rank is averaged by itself first, as the official trainer does.

    Raises ConfigError on every rank when the loss of a step is not finite, and DataError on every rank when too many
    pictures were bad.
    """
    progress = Progress()
    stream = iter(batches)
    engine.train()
    for plan in plans:
        started = time.perf_counter()
        lr = engine.get_lr()[0]
        denominator = max(1, supervised_tokens(plan))
        totals = torch.zeros(4, dtype=torch.float64)  # loss, tokens, seconds spent waiting for data, bad samples
        num_micro_steps = len(plan.micro_batches)
        for micro_step in range(num_micro_steps):
            waiting = time.perf_counter()
            batch = next(stream)
            totals[2] += time.perf_counter() - waiting
            totals[3] += len(batch.problems)
            for problem in batch.problems:
                print(f"left out of step {progress.step + 1}: {problem}")
            share = _step_share(batch, denominator, num_micro_steps, settings)
            engine.set_gradient_accumulation_boundary(micro_step == num_micro_steps - 1)
            loss = engine(batch.to(settings.device)) * share
            totals[0] += loss.item()
            totals[1] += batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
            # DeepSpeed averages over ranks and over the accumulation steps that it was told; ours is a sum.
            engine.backward(loss * (settings.world_size * settings.grad_accum_steps))
            engine.step()
        totals = _sum_over_ranks(totals, settings)
        progress.step += 1
        progress.samples_seen += len(plan.slots)
        progress.tokens_seen += int(totals[1])
        progress.loss = float(totals[0])
        progress.bad_samples += int(totals[3])
        progress.data_state = plan.state_after
        _check_bad_samples(progress, settings.max_bad_frac)
        if not math.isfinite(progress.loss):  # summed over the ranks: every one stops here
            raise ConfigError(
                f"the loss of step {progress.step} is {progress.loss}; nothing is saved from it.\n"
                f"  Lower train.learning_rate={lr:g}, or look at the samples of the step."
            )
        seconds = time.perf_counter() - started
        record = {
            "step": progress.step,
            "loss": progress.loss,
            "lr": lr,
            "grad_norm": _grad_norm(engine),
            "samples_per_s": len(plan.slots) / seconds,
            "tokens_per_s": float(totals[1]) / seconds,
            "data_wait_frac": float(totals[2]) / settings.world_size / seconds,
            "samples_seen": progress.samples_seen,
            "tokens_seen": progress.tokens_seen,
            "step_s": seconds,
            "bad_samples": progress.bad_samples,
        }
        for tracker in trackers:
            tracker.log(record)
        if settings.save_steps and progress.step % settings.save_steps == 0:
            save(progress)
    if not settings.save_steps or progress.step % settings.save_steps:
        save(progress)
    for tracker in trackers:
        tracker.close()
    return progress


def _step_share(batch: Batch, denominator: int, num_micro_steps: int, settings: LoopSettings) -> float:
    if settings.loss_averaging == "global_tokens":
        return 1.0 / denominator
    return 1.0 / (max(1, batch.num_supervised) * settings.world_size * num_micro_steps)


def _check_bad_samples(progress: Progress, max_bad_frac: float) -> None:
    """The first ten are let pass, so that an early one does not end a run that allows for some."""
    if progress.bad_samples <= max(10 if max_bad_frac else 0, max_bad_frac * progress.samples_seen):
        return
    raise DataError(
        f"{progress.bad_samples} of {progress.samples_seen} samples had a picture that is missing or does not decode, "
        f"more than data.max_bad_frac={max_bad_frac:g} allows; their names stand above.\n"
        "  Look at them with tools/doctor, or raise data.max_bad_frac."
    )


def _sum_over_ranks(totals: torch.Tensor, settings: LoopSettings) -> torch.Tensor:
    if settings.world_size == 1:
        return totals
    moved = totals.to(settings.device)
    dist.all_reduce(moved)
    return moved.cpu()


def _grad_norm(engine: Any) -> float | None:
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
