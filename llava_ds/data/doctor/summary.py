"""A report of tools/doctor as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_ds.data.doctor.findings import ERROR, NOTE, WARNING

_TITLES = {
    ERROR: "ERRORS: records that training refuses, or skips with data.on_bad_sample=skip",
    WARNING: "WARNINGS: they train, but look at them",
    NOTE: "NOTES",
}


def summarize(report: dict[str, Any]) -> str:
    """The findings by severity with examples, then lengths and expected waste."""
    return "\n".join([*_findings(report), "", *_lengths(report), *_verdict(report)])


def _findings(report: dict[str, Any]) -> Iterator[str]:
    for severity, title in _TITLES.items():
        found = {name: one for name, one in report["findings"].items() if one["severity"] == severity}
        if not found:
            continue
        yield f"\n{title}"
        for name, one in found.items():
            images = f" ({one['num_images']:,} distinct)" if one["num_images"] is not None else ""
            yield f"  {one['count']:>9,}{images}  {name}: {one['meaning']}"
            yield from map(_example, one["examples"] if severity != NOTE else [])
            if severity != NOTE and one["count"] > len(one["examples"]) > 0:
                yield f"{'':15}..."


def _example(example: dict[str, Any]) -> str:
    where = example["origin"] if example["id"] is None else f"{example['origin']} id={example['id']!r}"
    message = example["message"]
    text = message if message.startswith(example["origin"]) else f"{where}: {message}"
    return f"{'':15}" + text.replace("\n", f"\n{'':17}")


def _lengths(report: dict[str, Any]) -> Iterator[str]:
    lengths, waste, settings = report["lengths"], report["waste"], report["settings"]
    if lengths is not None:
        names = list(lengths["tokens"]["percentiles"])
        yield f"{'percentile':<18}" + "".join(f"{name:>7}" for name in names) + f"{'mean':>10}"
        for kind in ("tokens", "supervised", "images"):
            values = lengths[kind]["percentiles"].values()
            yield f"{kind:<18}" + "".join(f"{value:>7}" for value in values) + f"{lengths[kind]['mean']:>10.1f}"
        yield (
            f"{lengths['tokens']['total']:,} tokens (limit {settings['max_length']} a sample, "
            f"{settings['num_patches']} an image), {lengths['supervised_frac']:.1%} of them supervised"
        )
    if waste is not None:
        yield (
            f"expected waste with {waste['world_size']} ranks and {waste['global_batch_size']} samples a step: "
            f"packed {waste['packed']:.1%}, padded {waste['padded']:.1%}, "
            f"padded with data.length_groups={waste['length_groups']} {waste['padded_by_length']:.1%}"
        )


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    for reason in report["not_checked"]:
        yield f"not checked: {reason}"
    total, seconds = report["data"]["num_records"], report["seconds"]
    yield (
        f"{report['data']['path']}: {report['num_good']:,} of {total:,} records are good "
        f"({seconds:.1f} s, {report['num_processes']} process(es))"
    )
