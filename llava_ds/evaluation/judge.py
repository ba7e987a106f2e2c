"""Judgements of a benchmark's answers: planned, asked through a chat endpoint, and collected, each exactly once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_ds.api.client import ChatClient
from llava_ds.api.messages import ChatReply, ChatRequest, Message, Outcome
from llava_ds.errors import DataError
from llava_ds.evaluation.judge_parsing import parse_scores
from llava_ds.evaluation.judge_prompts import JudgeRule, Order
from llava_ds.evaluation.llava_bench import Bench

# Repeats are attempts of one request, so far apart that asking again never reaches the next repeat.
_ATTEMPTS_APART = 1000


@dataclass(frozen=True)
class Plan:
    """How often a benchmark is judged: every question in each order, ``repeats`` times."""

    orders: tuple[Order, ...]
    repeats: int
    seed: int
    max_attempts: int


@dataclass(frozen=True)
class Slot:
    """One judgement that is wanted."""

    answers: str
    question_id: str
    category: str
    order: Order
    repeat: int
    role: str

    @property
    def request_id(self) -> str:
        """Names its request in reports."""
        return f"{self.answers}/{self.question_id}/{self.order}/{self.repeat}"

    def scores(self, text: str) -> tuple[float, float]:
        """Reference's and candidate's score. Raises DataError for what cannot be read."""
        first, second = parse_scores(text, self.role)
        return (first, second) if self.order == "reference_first" else (second, first)


@dataclass(frozen=True)
class Judgement:
    """What became of a slot: ``scores`` (reference, candidate), or a ``problem``.

    ``was_judged`` is false where there is no reply to read: a budget was spent, or calls failed. ``text`` is the last
    reply, ``models`` are the names under which the server gave this and refused replies.
    """

    slot: Slot
    scores: tuple[float, float] | None
    problem: str | None
    was_judged: bool
    text: str
    models: tuple[str, ...]
    response_id: str | None
    attempts: int
    cached: bool

    def to_json(self) -> dict[str, Any]:
        """As it stands in results."""
        values = asdict(self)
        slot = values.pop("slot")
        return {key: slot[key] for key in ("question_id", "category", "order", "repeat")} | values


def plan_requests(
    bench: Bench, rule: JudgeRule, plan: Plan, model: str, extra_body: Mapping[str, Any]
) -> list[tuple[Slot, ChatRequest]]:
    """Every judgement with its request. Equal answers of two models give equal requests, which the client pays once.

    Raises ConfigError when the rule lacks a kind of question.
    """
    rule.check(bench.kind, {question.category for question in bench.questions})
    planned = []
    for answers in bench.answers:
        for question in bench.questions:
            role = rule.prompt(bench.kind, question.category)["role"]
            for order in plan.orders:
                content = rule.content(bench.kind, question, answers.texts[question.id], order)
                for repeat in range(plan.repeats):
                    slot = Slot(answers.name, question.id, question.category, order, repeat, role)
                    planned.append((slot, _request(slot, content, rule, plan, model, extra_body)))
    return planned


def _request(
    slot: Slot, content: str, rule: JudgeRule, plan: Plan, model: str, extra_body: Mapping[str, Any]
) -> ChatRequest:
    settings = rule.settings
    return ChatRequest(
        id=slot.request_id,
        model=model,
        messages=(Message("system", settings.system), Message("user", content)),
        max_tokens=settings.max_tokens,
        seed=_seed(plan.seed, slot) if settings.send_seed else None,
        extra_body={"temperature": settings.temperature, **extra_body},  # None leaves it out
        attempt=slot.repeat * _ATTEMPTS_APART,
    )


def _seed(seed: int, slot: Slot) -> int:
    """Of a question and an order; the client adds the attempt, and so the repeat. It fits 31 bits with these."""
    digest = hashlib.sha256(f"{seed}|{slot.question_id}|{slot.order}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 2


def judge(client: ChatClient, planned: Sequence[tuple[Slot, ChatRequest]], max_attempts: int) -> list[Judgement]:
    """Asks what is planned; judgements in the plan's order, one for each slot.

    Raises what ``ChatClient.ask`` raises.
    """
    slots = {request.id: slot for slot, request in planned}

    def check(request: ChatRequest, reply: ChatReply) -> str | None:
        try:
            slots[request.id].scores(reply.text)
        except DataError as error:
            return error.reason
        return None

    outcomes = client.ask([request for _, request in planned], check, max_attempts)
    found = {outcome.request.id: outcome for outcome in outcomes}
    return [_judgement(slot, found[request.id]) for slot, request in planned]


def _judgement(slot: Slot, outcome: Outcome) -> Judgement:
    replies = [*(reply for reply, _ in outcome.rejected), *([outcome.reply] if outcome.reply else [])]
    last = replies[-1] if replies else None
    problem = outcome.problem or ""
    is_unparsable = problem.startswith("rejected")
    return Judgement(
        slot,
        slot.scores(outcome.reply.text) if outcome.reply else None,
        outcome.rejected[-1][1] if is_unparsable else outcome.problem,
        outcome.reply is not None or is_unparsable,
        last.text if last else "",
        tuple(reply.model for reply in replies),
        last.response_id if last else None,
        outcome.request.attempt - slot.repeat * _ATTEMPTS_APART + 1,
        bool(last and last.cached),
    )


def by_answers(judgements: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    """The judgements of each model, in the order of the models."""
    groups: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.slot.answers].append(judgement)
    return dict(groups)
