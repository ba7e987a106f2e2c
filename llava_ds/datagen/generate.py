"""From annotated images to a folder of samples that a language model wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_ds.api.client import ChatClient
from llava_ds.api.dry_run import Estimate, estimate
from llava_ds.api.messages import ChatReply, ChatRequest
from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.output import PROVENANCE_LINES, REJECTS_FILE, OutputFolder
from llava_ds.datagen.plan import PlannedSample, plan_samples
from llava_ds.datagen.prompt_files import Prompt
from llava_ds.datagen.records import Records
from llava_ds.datagen.requests import GenerationSettings, Requests
from llava_ds.datagen.results import Result, refuse_repeated, result_of, sum_tokens
from llava_ds.datagen.validate import find_fault


def generate(
    records: Records, settings: GenerationSettings, prompts: Mapping[str, Prompt], client: ChatClient, out: Path
) -> dict[str, Any]:
    """Asks for every planned sample, writes all that is good into ``out``, and returns the report.

    The same inputs and replies give the same files, whatever the order of completion. After a kill, the same call goes
    on with the replies in the client's cache.
    Raises ConfigError when ``out`` was begun with other settings, and what the client raises.
    """
    samples = plan_samples(records.images, settings.mix, settings.num_samples, settings.seed)
    folder = OutputFolder(out, _inputs(records, samples, settings, prompts), client.endpoint.public_url, ("openai",))
    folder.begin()
    by_id = {sample.id: sample for sample in samples}

    def check(request: ChatRequest, reply: ChatReply) -> str | None:
        sample = by_id[request.id]
        return find_fault(sample.kind, reply.text, reply.finish_reason, sample.image.instances)

    done = {}
    for outcome in client.ask(Requests(samples, prompts, settings), check, settings.max_attempts):
        done[outcome.request.id] = result_of(by_id[outcome.request.id], outcome)
    results = refuse_repeated(done[sample.id] for sample in samples)
    _write(folder, results, settings.seed, prompts, client)
    report = _report(results, records, client)
    folder.finish(report)
    return report


def estimate_generation(
    records: Records, settings: GenerationSettings, prompts: Mapping[str, Prompt], client: ChatClient
) -> dict[str, Estimate]:
    """Calls, tokens and cost by kind, and of ``all``. Nothing is asked or written."""
    samples = plan_samples(records.images, settings.mix, settings.num_samples, settings.seed)
    parts = {name: [sample for sample in samples if sample.kind.name == name] for name in KINDS} | {"all": samples}
    prices = client.budget.prices
    return {
        name: estimate(Requests(part, prompts, settings), client.cache, prices) for name, part in parts.items() if part
    }


def _inputs(
    records: Records,
    samples: Sequence[PlannedSample],
    settings: GenerationSettings,
    prompts: Mapping[str, Prompt],
) -> dict[str, Any]:
    return {
        **asdict(settings),
        "num_samples": len(samples),
        "records_sha256": records.fingerprint,
        "num_images": len(records.images),
        "prompts_sha256": {name: prompt.sha256 for name, prompt in prompts.items()},
    }


def _write(
    folder: OutputFolder, results: Sequence[Result], seed: int, prompts: Mapping[str, Prompt], client: ChatClient
) -> None:
    written = [result for result in results if result.pairs]
    folder.write_records(result.record(seed) for result in written)
    prices = client.budget.prices
    folder.write_lines(
        PROVENANCE_LINES, (result.provenance(prompts[result.sample.kind.name].sha256, prices) for result in written)
    )
    rejects = (result.rejects() for result in results if result.problem != "budget" or result.replies)
    folder.write_lines(REJECTS_FILE, (line for line in rejects if line["replies"] or not line["produced"]))


def _report(results: Sequence[Result], records: Records, client: ChatClient) -> dict[str, Any]:
    """Counts. ``open`` samples have no answer yet; tokens and cost are of all replies, ``this_run`` of this run's."""
    tokens = sum_tokens([given for result in results for given in result.replies])
    refused = Counter(
        given.reason.partition(":")[0] for result in results for given in result.replies if given.reason is not None
    )
    return {
        "is_complete": not any(result.is_open for result in results),
        "num_images": len(records.images),
        "left_out_of_records": dict(sorted(records.left_out.items())),
        "planned": _by_kind(results),
        "produced": _by_kind([result for result in results if result.pairs]),
        "rejected": _by_kind([result for result in results if result.problem and not result.is_open]),
        "open": dict(Counter(str(result.problem)[:100] for result in results if result.is_open).most_common(20)),
        "refused_replies": dict(refused.most_common()),
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "cost_usd": client.budget.prices.cost_usd(tokens),
        "this_run": client.report.to_json(),
    }


def _by_kind(results: Sequence[Result]) -> dict[str, int]:
    counts = Counter(result.sample.kind.name for result in results)
    return {name: counts[name] for name in KINDS}

