"""The one training loop. A stage is data: a freeze table, learning rates, a template, a data set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llava_ds.data.sampler import StepPlan
from llava_ds.distributed import Ranks
from llava_ds.engine.agree import check_planned, next_batches, raise_failure, sum_over_ranks, too_many_bad
from llava_ds.engine.preemption import StopRequested
from llava_ds.engine.training_state import Progress, seed_step
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Batch


class StepSaver(Protocol):
    """Where checkpoints go (engine/saving.py). All ranks call the same methods in the same order."""

    def start(self, progress: Progress) -> None:
        """Begins to save a step."""

    def votes(self) -> tuple[int, int]:
        """Whether this rank has written its part of the save that runs, and whether something failed."""

    def fail(self, message: str) -> None:
        """Ends the run on all ranks when they next agree."""

    def settle(self, num_done: int, num_failed: int, progress: Progress) -> None:
        """Takes the sum of all ranks' votes. Raises CheckpointError on every rank when something failed."""

    def finish(self) -> None:
        """Waits until the save that runs is committed."""

    def save_now(self, progress: Progress) -> None:
        """Saves a step and returns when it is committed."""


class Guard(Protocol):
    """Who watches over this rank (engine/watchdog.py). All ranks enter the same phases."""

    def enter(self, phase: str, step: int, samples: Sequence[int | str] = ()) -> None:
        """This rank goes on to a phase of a step, with samples by id, or by the number of their record."""

    def wants_stop(self) -> bool:
        """Whether this rank was asked to end."""


class Evaluate(Protocol):
    """What measures the model between steps (engine/evaluation.py). All ranks call it for every step."""

    def __call__(self, engine: Any, step: int, guard: Guard) -> dict[str, Any]:
        """The numbers after a step, or none when no evaluation is due. Raises as ``train`` does."""


class Tracker(Protocol):
    """Where the numbers of a step go."""

    def log(self, record: dict[str, Any]) -> None:
        """Takes one step's numbers, with those of an evaluation after it; step 0 has only these."""

    def close(self) -> None:
        """Ends the run."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop must know of the run."""

    ranks: Ranks
    grad_accum_steps: int
    """Of a whole step, as DeepSpeed was told; a step may take more (``train.micro_batch_tokens``) or fewer."""
    loss_averaging: str
    save_steps: int | None
    device: torch.device
    seed: int = 0
    max_bad_frac: float = 0.0


def train(
    engine: Any,
    batches: Iterable[Batch],
    plans: Iterable[StepPlan],
    supervised_tokens: Callable[[StepPlan], int],
    settings: LoopSettings,
    trackers: list[Tracker],
    saver: StepSaver,
    progress: Progress,
    guard: Guard,
    evaluate: Evaluate | None = None,
) -> Progress:
    """Runs every planned step from ``progress`` on and saves at the end (and every ``save_steps``).

    What ``evaluate`` finds stands with the numbers of its step, as one record: a step that is saved has both.

    The loss of a step is the sum over its supervised tokens divided by their number over all ranks and
    micro-batches, so its gradients do not depend on how the step is split; with ``per_micro_batch`` every
    micro-batch of every rank is averaged by itself first, as the official trainer does.

    Before a step the ranks agree that all have its data. Raises on every rank: DataError when one has not, when too
    many pictures were bad, or when the data is not what was planned; ConfigError when a loss is not finite;
    CheckpointError when a step could not be saved; StopRequested when one was asked to end, after saving.
    """
    stream = iter(batches)
    engine.train()
    try:
        if evaluate and not progress.step:
            _log({"step": 0, **evaluate(engine, 0, guard)}, trackers, saver)
        for plan in plans:
            record = _train_step(engine, stream, plan, supervised_tokens, settings, saver, progress, guard)
            if evaluate:
                record |= evaluate(engine, progress.step, guard)
            _log(record, trackers, saver)
            if settings.save_steps and progress.step % settings.save_steps == 0:
                guard.enter("saving", progress.step)
                saver.start(progress)
    except (ConfigError, DataError):  # which all ranks raise together
        saver.finish()
        raise
    guard.enter("saving", progress.step)
    saver.save_now(progress)
    return progress


def _log(record: dict[str, Any], trackers: Sequence[Tracker], saver: StepSaver) -> None:
    try:
        for tracker in trackers:
            tracker.log(record)
    except OSError as error:  # of rank 0: the others hear of it with the next step
        saver.fail(f"the numbers of step {record['step']} cannot be written: {error}")


def _train_step(
    engine: Any,
    stream: Iterator[Batch],
    plan: StepPlan,
    supervised_tokens: Callable[[StepPlan], int],
    settings: LoopSettings,
    saver: StepSaver,
    progress: Progress,
    guard: Guard,
) -> dict[str, Any]:
    """One planned step: ``progress`` goes on, and its numbers are returned. Raises as ``train`` does."""
    started, step = time.perf_counter(), progress.step + 1
    lr = engine.get_lr()[0]
    rank = settings.ranks.rank
    guard.enter("reading data", step, [slot.index for row in plan.micro_batches for slot in row[rank]])
    micro_batches, failure = next_batches(stream, len(plan.micro_batches))
    waited = time.perf_counter() - started
    guard.enter("agreeing that all have data", step, [name for batch in micro_batches for name in batch.sample_ids])
    num_supervised, num_bad = _agree(micro_batches, failure, saver, progress, settings, guard)
    num_seen = progress.samples_seen + len(plan.slots)
    if too_many_bad(progress.bad_samples + num_bad, num_seen, settings.max_bad_frac):
        if progress.step:
            guard.enter("saving before the end", progress.step)
            saver.save_now(progress)
        raise _bad_samples_error(progress.bad_samples + num_bad, num_seen, progress.step, settings.max_bad_frac)
    if not num_bad:
        check_planned("step", supervised_tokens(plan), num_supervised)
    seed_step(settings.seed, step, rank)
    step_loss, num_tokens = _compute(engine, micro_batches, plan, step, num_supervised, settings, guard)
    guard.enter("adding up its numbers", step)
    totals = sum_over_ranks(
        torch.tensor([step_loss, num_tokens, waited], dtype=torch.float64), settings.ranks, settings.device
    )
    progress.step = step
    progress.samples_seen += len(plan.slots)
    progress.tokens_seen += int(totals[1])
    progress.bad_samples += num_bad
    progress.loss = float(totals[0])
    progress.data_state = plan.state_after
    if not math.isfinite(progress.loss):  # summed over the ranks: every one stops here
        raise ConfigError(
            f"the loss of step {progress.step} is {progress.loss}; nothing is saved from it.\n"
            f"  Lower train.learning_rate={lr:g} in a new run, which may start from the last checkpoint "
            "(model.init_from), or look at the samples of the step."
        )
    seconds = time.perf_counter() - started
    return {
        "step": progress.step,
        "loss": progress.loss,
        "lr": lr,
        "grad_norm": _grad_norm(engine),
        "samples_per_s": len(plan.slots) / seconds,
        "tokens_per_s": float(totals[1]) / seconds,
        "data_wait_frac": float(totals[2]) / settings.ranks.world_size / seconds,
        "samples_seen": progress.samples_seen,
        "tokens_seen": progress.tokens_seen,
        "step_s": seconds,
        "bad_samples": progress.bad_samples,
    }


def _compute(
    engine: Any,
    batches: Sequence[Batch],
    plan: StepPlan,
    step: int,
    num_supervised: int,
    settings: LoopSettings,
    guard: Guard,
) -> tuple[float, int]:
    """Forward, backward and the optimizer's step; returns this rank's share of the loss, and its tokens."""
    losses, num_tokens = [], 0
    for number, batch in enumerate(batches):
        for problem in batch.problems:
            print(f"left out of step {step}: {problem}")
        share = _step_share(batch, plan, num_supervised, settings)
        engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
        guard.enter("forward", step, batch.sample_ids)
        loss = engine(batch.to(settings.device)) * share
        losses.append(loss.detach())
        num_tokens += batch.num_tokens
        guard.enter("backward", step, batch.sample_ids)
        # DeepSpeed averages over ranks and over the accumulation steps that it was told; ours is a sum.
        engine.backward(loss * (settings.ranks.world_size * settings.grad_accum_steps))
        guard.enter("the optimizer's step", step)
        engine.step()
    return float(torch.stack(losses).double().sum()), num_tokens


def _agree(
    batches: Sequence[Batch],
    failure: DataError | None,
    saver: StepSaver,
    progress: Progress,
    settings: LoopSettings,
    guard: Guard,
) -> tuple[int, int]:
    """Supervised tokens and bad samples of a step over all ranks, and the state of the save that runs.

    Raises DataError on all ranks when one has a failure, CheckpointError when one could not save, StopRequested when
    one was asked to end.
    """
    counts = (sum(b.num_supervised for b in batches), sum(len(b.problems) for b in batches), int(failure is not None))
    votes = (*saver.votes(), int(guard.wants_stop()))
    totals = sum_over_ranks(torch.tensor((*counts, *votes), dtype=torch.float64), settings.ranks, settings.device)
    num_supervised, num_bad, num_failed, num_saved, num_not_saved, num_asked = map(int, totals.tolist())
    if num_not_saved:
        guard.enter("saving what can be saved", progress.step)
    saver.settle(num_saved, num_not_saved, progress)
    if num_asked:  # before failures: the signal may have ended what reads the data
        guard.enter("saving before the end", progress.step)
        saver.save_now(progress)
        raise StopRequested(progress.step)
    if num_failed:
        raise_failure(settings.ranks, failure)
    return num_supervised, num_bad


def _bad_samples_error(num_bad: int, num_seen: int, step: int, max_bad_frac: float) -> DataError:
    saved = f"; step {step} is saved" if step else ""
    return DataError(
        f"{num_bad} of {num_seen} samples had a picture that is missing or does not decode, more than "
        f"data.max_bad_frac={max_bad_frac:g} allows{saved}.\n"
        "  Look at the data with tools/doctor, or raise data.max_bad_frac.",
        on_every_rank=True,
    )


def _step_share(batch: Batch, plan: StepPlan, num_supervised: int, settings: LoopSettings) -> float:
    """What a micro-batch's summed loss is multiplied with."""
    if settings.loss_averaging == "global_tokens":
        return 1.0 / max(1, num_supervised)
    num_filled = sum(bool(share) for row in plan.micro_batches for share in row)
    return 1.0 / (max(1, batch.num_supervised) * num_filled)


def _grad_norm(engine: Any) -> float | None:
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
