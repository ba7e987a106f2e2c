"""Measures the model on held-out samples between two steps, under every ZeRO stage.

All ranks run the same number of forward passes, in evaluation mode and without gradients. Nothing of training changes:
neither its data, nor its random numbers (which every step seeds anew), nor its optimizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llava_ds.data.build import EvalData
from llava_ds.data.sampler import StepPlan
from llava_ds.engine.agree import check_planned, next_batches, raise_failure, sum_over_ranks, too_many_bad
from llava_ds.engine.loop import Guard, LoopSettings
from llava_ds.errors import DataError
from llava_ds.schema import Batch


@dataclass(frozen=True)
class Evaluator:
    """Evaluates before step 1, after every ``every`` steps and after the last one."""

    data: EvalData
    every: int
    num_steps: int
    settings: LoopSettings

    def __call__(self, engine: Any, step: int, guard: Guard) -> dict[str, Any]:
        """The numbers of the model after ``step`` where an evaluation is due; else nothing. Collective.

        Raises DataError on every rank when one cannot read its data, or when too many pictures were bad.
        """
        if step % self.every and step != self.num_steps:
            return {}
        started = time.perf_counter()
        engine.eval()
        with torch.no_grad():
            loss, num_right, num_whole, num_answers, num_tokens, num_bad = self._sum(engine, step, guard)
        engine.train()
        return {
            "eval_loss": _ratio(loss, num_tokens),
            "eval_token_accuracy": _ratio(num_right, num_tokens),
            "eval_teacher_forced_exact": _ratio(num_whole, num_answers),
            "eval_num_samples": len(self.data.plan.indices) - int(num_bad),
            "eval_num_answers": int(num_answers),
            "eval_num_tokens": int(num_tokens),
            "eval_bad_samples": int(num_bad),
            "eval_s": time.perf_counter() - started,
        }

    def _sum(self, engine: Any, step: int, guard: Guard) -> list[float]:
        """The sums over all samples and ranks: those of ``score_batch``, and the samples that are bad."""
        stream, scores, num_bad = iter(self.data.loader), [], 0
        for plan in self.data.plan.steps:
            batches = self._read(stream, plan, step, guard)
            for batch in batches:
                num_bad += len(batch.problems)
                guard.enter("evaluating", step, batch.sample_ids)
                scores.append(score_batch(engine, batch, self.settings.device))
        guard.enter("adding up what was evaluated", step)
        mine = torch.cat((torch.stack(scores).sum(dim=0).cpu(), torch.tensor([num_bad], dtype=torch.float64)))
        totals = sum_over_ranks(mine, self.settings.ranks, self.settings.device).tolist()
        self._check(num_tokens=int(totals[-2]), num_bad=int(totals[-1]))
        return totals

    def _read(self, stream: Iterator[Batch], plan: StepPlan, step: int, guard: Guard) -> list[Batch]:
        """This rank's micro-batches, once all ranks have theirs."""
        ranks = self.settings.ranks
        guard.enter("reading held-out data", step)
        batches, failure = next_batches(stream, len(plan.micro_batches))
        guard.enter("agreeing that all have held-out data", step, [n for batch in batches for n in batch.sample_ids])
        num_failed = sum_over_ranks(torch.tensor([failure is not None]).double(), ranks, self.settings.device)
        if num_failed:
            raise_failure(ranks, failure)
        for problem in [problem for batch in batches for problem in batch.problems]:
            print(f"left out of the evaluation after step {step}: {problem}")
        return batches

    def _check(self, num_tokens: int, num_bad: int) -> None:
        plan, max_bad_frac = self.data.plan, self.settings.max_bad_frac
        if too_many_bad(num_bad, len(plan.indices), max_bad_frac):
            raise DataError(
                f"{num_bad} of {len(plan.indices)} held-out samples had a picture that is missing or does not decode, "
                f"more than data.max_bad_frac={max_bad_frac:g} allows.\n  Look at the data with tools/doctor.",
                on_every_rank=True,
            )
        if not num_bad:
            check_planned("evaluation", plan.num_supervised, num_tokens)


def score_batch(engine: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """[5] float64 of a micro-batch: the sum of its loss, the supervised tokens that are the likeliest ones, the answers
    all of whose tokens are, the number of answers, and that of supervised tokens."""
    losses, right = engine(batch.to(device), per_token=True)
    if not batch.num_supervised:  # a dummy: it computes so that the ranks meet
        return torch.zeros(5, dtype=torch.float64, device=device)
    answers = number_answers(batch.loss_rows)
    num_answers = int(answers[-1]) + 1
    num_wrong = torch.zeros(num_answers, device=device).index_add_(0, answers.to(device), 1 - right)
    sums = (losses.double().sum(), right.double().sum(), (num_wrong == 0).double().sum())
    counts = torch.tensor([num_answers, batch.num_supervised], dtype=torch.float64, device=device)
    return torch.cat((torch.stack(sums), counts))


def number_answers(loss_rows: torch.Tensor) -> torch.Tensor:
    """[K] rising rows -> [K] which answer each belongs to, from 0. The rows of one answer follow one another; between
    two answers stands a question, or at least the first token of a sample, which nothing predicts."""
    return torch.cat((loss_rows.new_zeros(1), (loss_rows.diff() != 1).cumsum(0)))


def _ratio(total: float, count: float) -> float | None:
    """None where nothing was counted, or the loss is not finite: NaN is no JSON."""
    return total / count if count and math.isfinite(total) else None
