"""Asks a text-only model through a chat endpoint: for its own answers to ScienceQA problems, and to judge two answers.

It never sees the images; their problems are asked without. The messages are in our own words: the paper gives none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_ds.api.client import ChatClient
from llava_ds.api.messages import ChatReply, ChatRequest, Message
from llava_ds.api.options import ClientOptions
from llava_ds.data.sources.scienceqa import format_problem
from llava_ds.errors import BackendUnavailableError

MAX_TOKENS = 1024

_ANSWER_SYSTEM = (
    "You answer multiple-choice questions of school science. A question may refer to a picture that you cannot see; use "
    "the text alone. Explain your reasoning in a few sentences, then end with the line 'The answer is X.', where X is the "
    "letter of one option. If the text does not let you choose, say so and give no letter."
)
_JUDGE_SYSTEM = (
    "You decide multiple-choice questions of school science on which two assistants disagree. Assistant 1 saw the picture "
    "that may belong to the question; assistant 2 and you see the text alone. Weigh both explanations, then give your own "
    "final answer: end with the line 'The answer is X.', where X is the letter of one option."
)


def answer_requests(
    problems: Mapping[str, Any], shots: Sequence[Any], endpoint: ClientOptions, max_tokens: int = MAX_TOKENS
) -> list[ChatRequest]:
    """One request a problem, after solved ones as ``shots`` (chain of thought: lecture, explanation, answer)."""
    solved = [
        message
        for number, shot in enumerate(shots)
        for message in _as_chat(*format_problem(shot, "QCM-LEA", f"example {number + 1}"))
    ]
    return [
        _request(pid, [Message("system", _ANSWER_SYSTEM), *solved, Message("user", _question(problem, pid))], endpoint, max_tokens)
        for pid, problem in problems.items()
    ]


def judge_requests(
    problems: Mapping[str, Any],
    answers: Mapping[str, tuple[str, str]],
    endpoint: ClientOptions,
    max_tokens: int = MAX_TOKENS,
) -> list[ChatRequest]:
    """One request for each problem of ``answers``, which holds what the first and the second model answered."""
    return [
        _request(
            pid,
            [
                Message("system", _JUDGE_SYSTEM),
                Message(
                    "user",
                    f"{_question(problems[pid], pid)}\n\n[Assistant 1]\n{first.strip()}\n\n[Assistant 2]\n{second.strip()}",
                ),
            ],
            endpoint,
            max_tokens,
        )
        for pid, (first, second) in answers.items()
    ]


def ask_all(client: ChatClient, requests: Iterable[ChatRequest]) -> dict[str, ChatReply]:
    """The reply to each request by its id, in their order.

    Raises BackendUnavailableError that counts the requests without one by what went wrong; the replies that came are in
    the cache.
    """
    requests = list(requests)
    outcomes = {outcome.request.id: outcome for outcome in client.ask(requests)}
    problems = Counter(outcome.problem for outcome in outcomes.values() if outcome.reply is None)
    if problems:
        listed = ", ".join(f"{problem} ({count})" for problem, count in problems.most_common())
        raise BackendUnavailableError(
            f"{problems.total()} of {len(requests)} requests have no reply: {listed}\n"
            "  Run the same command again: the replies that came are kept, only the others are asked."
        )
    return {request.id: outcomes[request.id].reply for request in requests}


def _question(problem: Any, pid: str) -> str:
    return format_problem(problem, "QCM-A", f"problem {pid!r}")[0]


def _as_chat(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


def _request(pid: str, messages: Sequence[Message], endpoint: ClientOptions, max_tokens: int) -> ChatRequest:
    return ChatRequest(pid, endpoint.model or "", tuple(messages), max_tokens, extra_body=endpoint.extra_body)
