"""The result of tools/judge: all judgements, all numbers, and what they came from."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_ds.api.client import ChatClient
from llava_ds.api.messages import ChatRequest
from llava_ds.api.options import ClientOptions
from llava_ds.durable import replace_file
from llava_ds.evaluation.judge import Judgement, Plan, Slot, by_answers
from llava_ds.evaluation.judge_prompts import JudgeRule
from llava_ds.evaluation.judge_summary import compare, summarize
from llava_ds.evaluation.llava_bench import Answers, Bench
from llava_ds.evaluation.question_rows import listed
from llava_ds.evaluation.statistics import Bootstrap

_PACKAGES = ("llava_ds", "openai", "numpy")


def build_report(
    bench: Bench, rule: JudgeRule, plan: Plan, options: ClientOptions, client: ChatClient,
    planned: Sequence[tuple[Slot, ChatRequest]], judgements: Sequence[Judgement], bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Everything as JSON values; ``comparison`` where two models were judged."""
    groups = by_answers(judgements)
    report = {
        "benchmark": f"llava_bench_{bench.kind}",
        "num_questions": dict(Counter(question.category for question in bench.questions)),
        "files": dict(bench.sha256),
        "judge": _judge(rule, plan, options, client, planned[0][1], judgements),
        "bootstrap": vars(bootstrap),
        "models": {
            answers.name: _answers(answers) | summarize(bench.questions, groups[answers.name], bootstrap)
            for answers in bench.answers
        },
        "api": client.report.to_json(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
    }
    if len(groups) == 2:
        (first, ones), (second, others) = groups.items()
        report["comparison"] = {
            "first": first, "second": second, "scores": compare(bench.questions, ones, others, bootstrap)
        }
    report["warnings"] = list(_warnings(report))
    report["judgements"] = {name: [one.to_json() for one in group] for name, group in groups.items()}
    return report


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes it as JSON, whole or not at all."""
    replace_file(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def is_complete(report: dict[str, Any]) -> bool:
    """Whether a reply came for every judgement, and every model has a score."""
    return not any(model["not_judged"] or not model["scores"]["all"] for model in report["models"].values())


def _answers(answers: Answers) -> dict[str, Any]:
    return {"model": answers.model, "answers": str(answers.file), "num_empty_answers": answers.num_empty}


def _judge(
    rule: JudgeRule, plan: Plan, options: ClientOptions, client: ChatClient, request: ChatRequest,
    judgements: Sequence[Judgement],
) -> dict[str, Any]:
    sent = request.body()
    return {
        "model": options.model,
        "served_as": dict(Counter(name for one in judgements for name in one.models)),
        "base_url": client.endpoint.public_url,
        "rule": {"file": rule.path.name if rule.is_own else str(rule.path), "sha256": rule.sha256, "own": rule.is_own},
        **rule.settings.model_dump(),
        **vars(plan),  # its orders are those that were asked
        # Out of what was sent, where the extra body has the last word; None: none was.
        "temperature": sent.get("temperature"),
        "max_tokens": sent.get("max_tokens"),
        "send_seed": "seed" in sent,
        "extra_body": dict(options.extra_body),
    }


def _warnings(report: dict[str, Any]) -> list[str]:
    served = report["judge"]["served_as"]
    warnings = []
    if len(served) > 1:
        names = ", ".join(f"{name} ({count} replies)" for name, count in sorted(served.items()))
        warnings.append(f"the server answered under {len(served)} names: {names}. These scores are not of one judge.")
    if report["api"]["from_other_endpoint"]:
        warnings.append(
            f"{report['api']['from_other_endpoint']} replies out of the cache came from another endpoint than "
            f"{report['judge']['base_url']}; give another --cache to ask this one."
        )
    for name, model in report["models"].items():
        if model["not_judged"]:
            warnings.append(
                f"{name}: INCOMPLETE, {sum(model['not_judged'].values())} of {model['num_judgements']} judgements were "
                f"not given ({_reasons(model['not_judged'])}). Run the same command again: what was paid is kept."
            )
        if model["unparsable"]:
            orders = report["judge"]["orders"]
            asked = model["num_judgements"] // len(orders)
            read = "; ".join(f"{order}: {model['num_scored_by_order'][order]} of {asked} read" for order in orders)
            warnings.append(
                f"{name}: {sum(model['unparsable'].values())} of {model['num_judgements']} judgements could not be "
                f"read ({_reasons(model['unparsable'])}) and are left out; {read}."
            )
        if model["excluded_questions"]:
            excluded, total = model["excluded_questions"], sum(report["num_questions"].values())
            warnings.append(
                f"{name}: {len(excluded)} of {total} questions lack a judgement in some order and are left out: "
                f"{listed(excluded)}."
            )
        if model["num_empty_answers"]:
            warnings.append(f"{name}: {model['num_empty_answers']} answers are empty; they were judged as they are.")
    return warnings


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())
