"""An ensemble from files and, where it takes one, a chat endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.api.dry_run import estimate
from llava_ds.api.messages import ChatReply, ChatRequest
from llava_ds.api.options import open_client
from llava_ds.data.sources.llava_json import check_unicode
from llava_ds.durable import replace_file
from llava_ds.evaluation.scienceqa_answers import Answer
from llava_ds.evaluation.scienceqa_columns import Problem
from llava_ds.evaluation.scienceqa_ensembles import complement, count_cases, judge, to_judge
from llava_ds.evaluation.scienceqa_predictions import (
    Prediction,
    format_predictions,
    parse_predictions,
    read_predictions,
)
from llava_ds.evaluation.scienceqa_score import count_reasons, decide, extract, tell_others
from llava_ds.evaluation.scienceqa_text_model import answer_requests, ask_all, choose_shots, judge_requests
from llava_ds.evaluation.scoring import Log, ScoreRequest


@dataclass(frozen=True)
class Ensemble:
    """The answers of the ensemble and of its second model by problem; ``details``, JSON values, say how they came.

    ``paid`` says it of the endpoint in a line, where it was asked.
    """

    answers: Mapping[str, Answer]
    second: Mapping[str, Answer]
    details: dict[str, Any]
    paid: str | None = None


def run_ensemble(
    request: ScoreRequest,
    second_file: Path,
    problems: Mapping[str, Problem],
    records: Mapping[str, Any],
    predictions: Mapping[str, Prediction],
    log: Log,
) -> Ensemble | str:
    """The ensemble of ``predictions`` with those of ``second_file``, which is written last if that is asked for.

    A text where nothing was asked, since ``request.endpoint`` wants a dry run: what it would take.

    Raises DataError for an answer that cannot be shown to a judge, and what ``ask_all`` raises.
    """
    first = decide(predictions, problems, request.official)
    endpoint, is_judge = request.endpoint, request.ensemble == "judge"
    with ExitStack() as opened:
        client = opened.enter_context(open_client(endpoint, log=log)) if request.ask_second or is_judge else None
        asked = None
        if client and request.ask_second:
            requests = answer_requests(records, choose_shots(request), endpoint)
            if endpoint.dry_run:
                return f"{second_file.name}: {estimate(requests, client.cache, client.budget.prices).summary()}"
            asked = format_predictions(map(_record, requests, ask_all(client, requests)))
        second_predictions = parse_predictions(asked, second_file) if asked else read_predictions(second_file)
        tell_others(second_file, second_predictions, problems, log)
        second = decide(second_predictions, problems, request.official)
        details: dict[str, Any] = {"kind": request.ensemble, "cases": count_cases(first, second)}
        answers = complement(first, second)
        if client and is_judge:
            texts = {pid: (_sent(predictions[pid]), _sent(second_predictions[pid])) for pid in to_judge(first, second)}
            requests = judge_requests(records, texts, endpoint)
            if endpoint.dry_run:
                return f"judge: {estimate(requests, client.cache, client.budget.prices).summary()}"
            replies = dict(zip(texts, ask_all(client, requests), strict=True))
            judged = {pid: extract(reply.text, problems[pid], request.official) for pid, reply in replies.items()}
            answers = judge(first, second, judged)
            details["judge"] = {
                "failed_by_reason": count_reasons(judged),
                "replies": {pid: _reply(reply) for pid, reply in replies.items()},
            }
        if asked:  # not before: were the judge's replies missing, the same command would find the file in its way
            replace_file(second_file, asked)
        if not client:
            return Ensemble(answers, second, details)
        details["asked"] = {"model": endpoint.model, "api": client.report.to_json()}
        if request.ask_second:
            details["asked"]["num_shots"] = request.shots
        return Ensemble(answers, second, details, client.report.summary())


def _sent(prediction: Prediction) -> str:
    check_unicode(prediction.place, prediction.text)
    return prediction.text


def _reply(reply: ChatReply) -> dict[str, str]:
    return {"text": reply.text, "model": reply.model, "response_id": reply.response_id}


def _record(request: ChatRequest, reply: ChatReply) -> dict[str, str]:
    # An endpoint may cut a character in two; half of one could not be sent to a judge.
    text = reply.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return {"id": request.id, "prompt": request.messages[-1].content, **_reply(reply), "text": text}
