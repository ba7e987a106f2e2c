"""Asks a text-only model through a chat endpoint: for its own answers to ScienceQA problems, and to judge two answers.

It never sees the images; their problems are asked without. The messages are in our own words: the paper gives none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from llava_ds.api.client import ChatClient
from llava_ds.api.messages import ChatReply, ChatRequest, Message
from llava_ds.api.options import ClientOptions
from llava_ds.data.sources.scienceqa import format_problem, read_split
from llava_ds.errors import BackendUnavailableError, ConfigError
from llava_ds.evaluation.scoring import ScoreRequest

_MAX_TOKENS = 1024

_ANSWER_SYSTEM = (
    "You answer multiple-choice questions of school science. A question may refer to a picture that you cannot see; "
    "use the text alone. Explain your reasoning in a few sentences, then end with the line 'The answer is X.', where X "
    "is the letter of one option. If the text does not let you choose, say so and give no letter."
)
_JUDGE_SYSTEM = (
    "You decide multiple-choice questions of school science on which two assistants disagree. Assistant 1 saw the "
    "picture that may belong to the question; assistant 2 and you see the text alone. Weigh both explanations, then "
    "give your own final answer: end with the line 'The answer is X.', where X is the letter of one option."
)


def answer_requests(problems: Mapping[str, Any], shots: Sequence[Any], endpoint: ClientOptions) -> list[ChatRequest]:
    """One request a problem, after the solved ones of ``shots`` (chain of thought: lecture, explanation, answer)."""
    solved = []
    for number, shot in enumerate(shots, 1):
        question, answer = format_problem(shot, "QCM-LEA", f"example {number}")
        solved += [Message("user", question), Message("assistant", answer)]
    return [
        _request(pid, [Message("system", _ANSWER_SYSTEM), *solved, Message("user", _question(problem, pid))], endpoint)
        for pid, problem in problems.items()
    ]


def judge_requests(
    problems: Mapping[str, Any], answers: Mapping[str, tuple[str, str]], endpoint: ClientOptions
) -> list[ChatRequest]:
    """One request for each problem of ``answers``, which hold what the first and the second model answered."""
    requests = []
    for pid, (first, second) in answers.items():
        both = f"[Assistant 1]\n{first.strip()}\n\n[Assistant 2]\n{second.strip()}"
        asked = Message("user", f"{_question(problems[pid], pid)}\n\n{both}")
        requests.append(_request(pid, [Message("system", _JUDGE_SYSTEM), asked], endpoint))
    return requests


def choose_shots(request: ScoreRequest) -> list[Any]:
    """The first problems of the train split that have an explanation, no image, and no place in the scored split.

    Raises ConfigError when there are fewer than ``request.shots``.
    """
    if not (request.shots and request.problems and request.splits):
        return []
    scored = read_split(request.problems, request.splits, request.split)
    try:
        train = read_split(request.problems, request.splits, "train")
    except ConfigError as error:
        raise ConfigError(f"{error}; --shots 0 asks without solved problems, which come from 'train'") from error
    fit = [
        problem
        for pid, problem in train.items()
        if pid not in scored and not problem.get("image") and problem.get("solution")
    ]
    if len(fit) < request.shots:
        raise ConfigError(
            f"--shots {request.shots}: split 'train' has {len(fit)} problems with an explanation, without an "
            f"image, and not in {request.split!r}; ask for fewer"
        )
    return fit[: request.shots]


def ask_all(client: ChatClient, requests: Sequence[ChatRequest]) -> list[ChatReply]:
    """The reply to each request, in their order.

    Raises BackendUnavailableError that counts the requests without one by what went wrong; the replies that came are in
    the cache.
    """
    outcomes = {outcome.request.id: outcome for outcome in client.ask(requests, _refuse_cut_off)}
    replies = [reply for request in requests if (reply := outcomes[request.id].reply)]
    if len(replies) < len(requests):
        ids: dict[str, list[str]] = defaultdict(list)
        for request in requests:
            if outcomes[request.id].reply is None:
                ids[str(outcomes[request.id].problem)].append(request.id)
        lines = [
            f"  {problem} ({len(lost)}, the first: {', '.join(lost[:3])})"
            for problem, lost in sorted(ids.items(), key=lambda item: -len(item[1]))
        ]
        is_final = [problem.startswith(("refused", "rejected")) for problem in ids]
        if any(is_final):
            lines.append("  What was refused is refused again: change these problems or options, or ask another model.")
        if not all(is_final):
            lines.append("  Run the same command again: the replies that came are kept, and only the others are asked.")
        head = f"{len(requests) - len(replies)} of {len(requests)} requests have no reply:"
        raise BackendUnavailableError("\n".join([head, *lines]))
    return replies


def _refuse_cut_off(_request: ChatRequest, reply: ChatReply) -> str | None:
    """Of a model that thinks first and came to no answer, nothing can be scored."""
    if reply.text or reply.finish_reason == "stop":
        return None
    return f"no text, ended by {reply.finish_reason!r}"


def _question(problem: Any, pid: str) -> str:
    return format_problem(problem, "QCM-A", f"problem {pid!r}")[0]


def _request(pid: str, messages: Sequence[Message], endpoint: ClientOptions) -> ChatRequest:
    return ChatRequest(pid, endpoint.model or "", tuple(messages), _MAX_TOKENS, extra_body=endpoint.extra_body)
