"""What became of planned samples: texts, or the reason why there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_ds.api.messages import ChatReply, ChatRequest, Outcome
from llava_ds.api.tokens import Tokens
from llava_ds.datagen.output import llava_record
from llava_ds.datagen.plan import PlannedSample
from llava_ds.datagen.reply import Pair, parse_reply
from llava_ds.datagen.validate import normalise_text
from llava_ds.text.instructions import DETAILED_INSTRUCTIONS, draw_instruction


@dataclass(frozen=True)
class GivenReply:
    """One reply to a request and why it was refused, or None."""

    attempt: int
    request_key: str
    reply: ChatReply
    reason: str | None


@dataclass(frozen=True)
class Result:
    """One planned sample: ``pairs`` where it was written, else ``problem`` says why it was not.

    ``is_open``: the endpoint gave no answer, or the budget was spent; another run may get one.
    """

    sample: PlannedSample
    replies: tuple[GivenReply, ...]
    pairs: tuple[Pair, ...] = ()
    problem: str | None = None
    is_open: bool = False

    def record(self, seed: int) -> dict[str, Any]:
        """The sample as LLaVA JSON; a detailed description answers an instruction drawn by (seed, sample id)."""
        pairs = self.pairs
        if not self.sample.kind.asks:
            instruction = draw_instruction(DETAILED_INSTRUCTIONS, seed, self.sample.id)
            pairs = (Pair(instruction, pairs[0].answer),)
        return llava_record(self.sample.id, self.sample.image.image, pairs)

    def provenance(self, prompt_sha256: str) -> dict[str, Any]:
        """Where the sample comes from, and what it took, with the replies refused before."""
        accepted = self.replies[-1]
        tokens = sum_tokens(self.replies)
        return {
            **self._names(),
            "model": accepted.reply.model,
            "attempt": accepted.attempt,
            "request_key": accepted.request_key,
            "response_ids": [given.reply.response_id for given in self.replies],
            "prompt_sha256": prompt_sha256,
            "prompt_tokens": tokens.prompt,
            "completion_tokens": tokens.completion,
        }

    def rejects(self) -> dict[str, Any]:
        """The replies that were refused, and why there is no sample, if there is none."""
        refused = [
            {
                "attempt": given.attempt,
                "reason": given.reason,
                "text": given.reply.text,
                "finish_reason": given.reply.finish_reason,
                "model": given.reply.model,
                "request_key": given.request_key,
                "response_id": given.reply.response_id,
            }
            for given in self.replies
            if given.reason is not None
        ]
        return {**self._names(), "produced": self.problem is None, "problem": self.problem, "replies": refused}

    def _names(self) -> dict[str, str]:
        return {"id": self.sample.id, "kind": self.sample.kind.name, "image": self.sample.image.image}


def result_of(sample: PlannedSample, outcome: Outcome) -> Result:
    """The result of an outcome of the client."""
    first = replace(outcome.request, attempt=0)
    replies = tuple(
        _given(first, attempt, reply, reason) for attempt, (reply, reason) in enumerate(outcome.rejected)
    )
    if outcome.reply is None:
        is_refused = (outcome.problem or "").startswith("rejected")
        return Result(sample, replies, problem=outcome.problem, is_open=not is_refused)
    accepted = _given(first, outcome.request.attempt, outcome.reply, None)
    return Result(sample, (*replies, accepted), parse_reply(sample.kind, outcome.reply.text))


def _given(first: ChatRequest, attempt: int, reply: ChatReply, reason: str | None) -> GivenReply:
    return GivenReply(attempt, replace(first, attempt=attempt).key(), reply, reason)


def refuse_repeated(results: Iterable[Result]) -> list[Result]:
    """The results in their order, those refused that say the same as one before: a model that repeats itself."""
    first: dict[bytes, str] = {}
    kept = []
    for result in results:
        if result.pairs:
            text = "\n".join(normalise_text(f"{pair.question} {pair.answer}") for pair in result.pairs)
            same = first.setdefault(hashlib.sha256(text.encode()).digest(), result.sample.id)
            if same != result.sample.id:
                result = _refuse(result, f"the same text as another sample: {same}")
        kept.append(result)
    return kept


def _refuse(result: Result, reason: str) -> Result:
    replies = (*result.replies[:-1], replace(result.replies[-1], reason=reason))
    return replace(result, replies=replies, pairs=(), problem=f"rejected: {reason}")


def sum_tokens(replies: Sequence[GivenReply]) -> Tokens:
    """Tokens of all replies, those refused included."""
    return Tokens(
        sum(given.reply.prompt_tokens for given in replies), sum(given.reply.completion_tokens for given in replies)
    )
