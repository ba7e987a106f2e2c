"""From annotated images to a folder of samples that a language model wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_ds.api.client import ChatClient
from llava_ds.api.dry_run import Estimate, estimate
from llava_ds.api.messages import ChatReply, ChatRequest
from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.output import PROVENANCE_LINES, REJECTS_FILE, REPORT_FILE, OutputFolder
from llava_ds.datagen.plan import PlannedSample, plan_samples
from llava_ds.datagen.prompt_files import Prompt
from llava_ds.datagen.records import Records
from llava_ds.datagen.report import add_run, count_results, read_report
from llava_ds.datagen.requests import GenerationSettings, Requests
from llava_ds.datagen.results import Result, refuse_repeated, result_of
from llava_ds.datagen.validate import find_fault


def generate(
    records: Records, settings: GenerationSettings, prompts: Mapping[str, Prompt], client: ChatClient, out: Path
) -> dict[str, Any]:
    """Asks for every planned sample, writes all that is good into ``out``, and returns the report.

    The same inputs and replies give the same files, whatever the order of completion. After a kill, the same call goes
    on with the replies in the client's cache. A run that ends early leaves what it paid in the report, too.
    Raises ConfigError when ``out`` was begun with other settings, and what the client raises.
    """
    samples = plan_samples(records.images, settings.mix, settings.num_samples, settings.seed)
    folder = OutputFolder(out, _inputs(records, samples, settings, prompts), client.endpoint.public_url, ("openai",))
    requests = Requests(samples, prompts, settings)
    next(iter(requests), None)  # settings that no request may have are refused before the folder is bound to them
    before = read_report(out / REPORT_FILE)
    folder.begin()
    by_id = {sample.id: sample for sample in samples}

    def check(request: ChatRequest, reply: ChatReply) -> str | None:
        sample = by_id[request.id]
        return find_fault(sample.kind, reply.text, reply.finish_reason, sample.image.instances)

    done = {}
    try:
        for outcome in client.ask(requests, check, settings.max_attempts):
            done[outcome.request.id] = result_of(by_id[outcome.request.id], outcome)
    except BaseException:
        folder.finish({**before, "is_complete": False, **add_run(before, client.report)})
        raise
    results = refuse_repeated(done[sample.id] for sample in samples)
    _write(folder, results, settings.seed, prompts)
    report = count_results(results, records, client.budget.prices) | add_run(before, client.report)
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


def _write(folder: OutputFolder, results: Sequence[Result], seed: int, prompts: Mapping[str, Prompt]) -> None:
    written = [result for result in results if result.pairs]
    folder.write_records(result.record(seed) for result in written)
    folder.write_lines(
        PROVENANCE_LINES, (result.provenance(prompts[result.sample.kind.name].sha256) for result in written)
    )
    rejects = (result.rejects() for result in results if result.problem != "budget" or result.replies)
    folder.write_lines(REJECTS_FILE, (line for line in rejects if line["replies"] or not line["produced"]))
