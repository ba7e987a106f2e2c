"""A whole data set looked at in parallel before any GPU is taken, as a report: tools/doctor."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from llava_ds.data.doctor.findings import CATALOGUE, ERROR, SEVERITIES, WARNING, Findings
from llava_ds.data.doctor.length_stats import LengthColumns, describe_lengths, expected_waste
from llava_ds.data.doctor.passes import Examination
from llava_ds.data.doctor.record_checks import RecordChecks
from llava_ds.data.sources.source import Source
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import DataError

REPORT_VERSION = 1


def examine(
    path: str,
    source: Source,
    text: TextPipeline | None,
    template: str = "v1",
    with_images: bool = True,
    num_processes: int | None = None,
    world_size: int = 8,
    global_batch_size: int = 128,
) -> dict[str, Any]:
    """Checks every record of ``source`` and every image, and returns a report that can be written as JSON.

    Args:
        path: as the user calls the source.
        text: tokenizer and limit; without it, lengths and what depends on them are not looked at.
        template: what the records are written for, where there is no ``text``.
        with_images: False leaves image files alone.
        num_processes: by default one a core. The report does not depend on it.
        world_size, global_batch_size: for the expected waste.

    The report::

        version        1
        data           {path, fingerprint, num_records}
        settings       {tokenizer, template, placement, max_length, truncation, num_patches, images, world_size,
                       global_batch_size}; null where it does not apply
        num_good       records without an error
        findings       {name: {severity, meaning, count, num_images, examples: [{origin, id, message}]}}; only what was
                       found; ``count`` is records; ``num_images`` distinct images, or null where it is not about
                       images; up to 5 examples. Names, severities and meanings: findings.py
        not_checked    [why, ...]
        lengths        {tokens, supervised, images: {percentiles, mean, total}, supervised_frac, histogram: {edges,
                       tokens, supervised}} of the good records; null without a tokenizer
        waste          see ``expected_waste``; null without a tokenizer
        num_processes, seconds

    Raises DataError when a process was killed, ConfigError when template and tokenizer do not go together.
    """
    begin = time.perf_counter()
    num_processes = num_processes or len(os.sched_getaffinity(0))
    checks = RecordChecks(text, text.template if text else template)
    checks.resolve()
    work = Examination(source, checks, Findings(), num_processes)
    table = work.look_at_records()
    num_images = work.look_at_images(table) if with_images else {}
    num_images["image_shared"] = work.find_shared_images(table)
    work.find_repeats(table)
    good = table.rows[~table.rows["is_bad"]]
    columns = LengthColumns(
        *(good[name].astype(np.int64) for name in ("num_tokens", "num_supervised", "num_kept_images"))
    )
    return {
        "version": REPORT_VERSION,
        "data": {"path": path, "fingerprint": source.fingerprint, "num_records": len(source)},
        "settings": {
            **_settings(text, checks.template), "images": with_images, "world_size": world_size,
            "global_batch_size": global_batch_size,
        },
        "num_good": len(good),
        "findings": _describe_findings(work.findings, num_images),
        "not_checked": _not_checked(text, with_images),
        "lengths": describe_lengths(columns, text.max_length) if text else None,
        "waste": expected_waste(columns, world_size, global_batch_size) if text else None,
        "num_processes": num_processes,
        "seconds": time.perf_counter() - begin,
    }


def exit_code(report: dict[str, Any], strict: bool = False) -> int:
    """1 when there are errors, or with ``strict`` warnings; else 0."""
    refused = (ERROR, WARNING) if strict else (ERROR,)
    return int(any(found["severity"] in refused for found in report["findings"].values()))


def write_report(report: dict[str, Any], path: Path) -> None:
    """The report as JSON, whole or not at all. Raises DataError when it cannot be written."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise DataError(f"{path}: the report cannot be written: {error.strerror}; give another file") from error


def _settings(text: TextPipeline | None, template: str) -> dict[str, Any]:
    names = ("placement", "max_length", "truncation", "num_patches")
    return {
        "tokenizer": text.tokenizer.name_or_path if text else None,
        "template": template,
        **{name: getattr(text, name) if text else None for name in names},
    }


def _not_checked(text: TextPipeline | None, with_images: bool) -> list[str]:
    reasons = []
    if text is None:
        reasons.append("lengths, truncation, unknown tokens: no tokenizer was given")
    if not with_images:
        reasons.append("image files: left alone as asked")
    return reasons


def _describe_findings(findings: Findings, num_images: dict[str, int]) -> dict[str, Any]:
    """Errors first, each severity in the order of the catalogue."""
    names = [name for one in SEVERITIES for name in CATALOGUE if CATALOGUE[name][0] == one and findings.counts[name]]
    return {
        name: {
            "severity": CATALOGUE[name][0],
            "meaning": CATALOGUE[name][1],
            "count": findings.counts[name],
            "num_images": num_images.get(name),
            "examples": [example._asdict() for example in findings.examples.get(name, [])],
        }
        for name in names
    }
