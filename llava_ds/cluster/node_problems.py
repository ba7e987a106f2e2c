"""Which nodes differ from the others, or lack what they need: pure functions over the reports of all nodes.

A node is measured by the majority, not by rank 0. What is wrong on most nodes is wrong with the settings, and no node
is to blame for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llava_ds.cluster.node_paths import PathReport
from llava_ds.cluster.node_report import NodeReport

_GIB = 1 << 30
_MIB = 1 << 20
_MAX_NAMES = 8
"""Of nodes in one message."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    node: str | None
    """None where no node is to blame, but the settings."""
    kind: str
    """``missing_path``, ``content``, ``run_dir``, ``code``, ``recipe``, ``versions``, ``gpus``, ``disk``,
    ``not_writable``, ``failed``, ``no_report``, ``several_processes``, ``wrong_sum``, ``stuck``, ``slow`` or
    ``report_file``."""
    message: str
    certain: bool = True
    """False where it is this node or another, and nothing tells which: then both are named."""


@dataclass(frozen=True)
class Limits:
    """Bytes that must be free on every node, by place."""

    run_dir: int = 10 * _GIB
    tmp: int = _GIB
    shm: int = 256 * _MIB
    """Asked for only where ``data.num_workers`` is not 0."""
    cache: int = 0


def find_problems(reports: Sequence[NodeReport], limits: Limits | None = None) -> list[Problem]:
    """Everything that is wrong with the nodes that reported, at once."""
    good = {report.node: report for report in reports if not report.error}
    return [
        *_several_processes(reports),
        *blame("failed", {r.node: r.error for r in reports if r.error}, len(reports), "Look at that first."),
        *_other_code(good),
        *_missing_paths(good),
        *_other_content(good),
        *_bad_places(good, limits or Limits()),
    ]


def _several_processes(reports: Sequence[NodeReport]) -> Iterator[Problem]:
    for node, number in Counter(report.node for report in reports).items():
        if number > 1:
            yield Problem(
                None, "several_processes",
                f"{number} processes ran on {node}, wanted 1. Start one per node: srun --ntasks-per-node=1.",
            )


def _other_code(reports: Mapping[str, NodeReport]) -> Iterator[Problem]:
    code = {node: report.code_hash[:16] for node, report in reports.items()}
    recipe = {node: report.recipe_hash[:16] for node, report in reports.items()}
    yield from compare("code", "the code of llava_ds has xxh128", code, "Install the same checkout on every node.")
    yield from compare("recipe", "the recipe has xxh128", recipe, "Give every node the same recipe file.")
    packages = {name: None for report in reports.values() for name in report.versions}
    for name in packages:
        versions = {node: _version(name, report.versions.get(name)) for node, report in reports.items()}
        yield from compare("versions", f"{name} is", versions, "Install the same version on every node.")
    gpus = {node: f"{len(report.gpus)} GPU(s)" for node, report in reports.items()}
    yield from compare("gpus", "PyTorch sees", gpus, "Look at nvidia-smi and CUDA_VISIBLE_DEVICES there.")


def _version(name: str, version: str | None) -> str:
    """What must be the same: of a driver only its branch, as clusters renew drivers a node at a time."""
    return "none" if version is None else version.split(".")[0] if name == "cuda_driver" else version


def _paths(reports: Mapping[str, NodeReport]) -> Iterator[tuple[str, dict[str, PathReport]]]:
    """Every setting, and what the nodes that looked at it saw."""
    for setting in {setting: None for report in reports.values() for setting in report.paths}:
        yield setting, {node: report.paths[setting] for node, report in reports.items() if setting in report.paths}


def _missing_paths(reports: Mapping[str, NodeReport]) -> Iterator[Problem]:
    for setting, seen in _paths(reports):
        lacking = {
            node: f"{setting}={path.path} {_what_is_wrong(path)}"
            for node, path in seen.items() if path.kind in ("missing", "unreadable")
        }
        may_lack = not all(path.required for path in seen.values())
        if not may_lack or 2 * len(lacking) <= len(seen):
            yield from blame("missing_path", lacking, len(seen), "Mount it or copy it there, or correct the setting.")


def _what_is_wrong(path: PathReport) -> str:
    return "is not there" if path.kind == "missing" else f"cannot be read ({path.error})"


def _other_content(reports: Mapping[str, NodeReport]) -> Iterator[Problem]:
    for setting, seen in _paths(reports):
        found = {
            node: f"{path.kind} with {path.size_bytes} bytes{_entries(path)} and xxh128 {path.digest[:16]}"
            for node, path in seen.items() if path.compared and path.kind in ("file", "folder")
        }
        where = next(iter(seen.values())).path
        yield from compare("content", f"{setting}={where} is a", found, "Copy it again, or mount the same one.")


def _entries(path: PathReport) -> str:
    return f" in {path.num_entries} entries" if path.kind == "folder" else ""


def _bad_places(reports: Mapping[str, NodeReport], limits: Limits) -> Iterator[Problem]:
    run_dirs = {node: report.places["run_dir"].path for node, report in reports.items() if "run_dir" in report.places}
    yield from compare("run_dir", "the nearest folder to the run folder is", run_dirs, "Mount the same disk there.")
    for name in ("run_dir", "tmp", "shm", "cache"):
        places = {
            node: report.places[name] for node, report in reports.items()
            if name in report.places and (name != "shm" or report.num_workers > 0)
        }
        sealed = {node: f"{name} {p.path} cannot be written: {p.error}" for node, p in places.items() if p.error}
        wanted = getattr(limits, name)
        full = {
            node: f"{name} {p.path} has {format_bytes(p.free_bytes)} free, less than {format_bytes(wanted)}"
            for node, p in places.items() if p.free_bytes < wanted and not p.error
        }
        yield from blame("not_writable", sealed, len(places), "Free or mount it, or choose another folder.")
        yield from blame("disk", full, len(places), "Free some, or choose another folder.")


def compare(kind: str, what: str, values: Mapping[str, str], remedy: str) -> list[Problem]:
    """The nodes whose value is not the one that more than half of the nodes have; ``values`` are by node.

    Of two nodes that differ both are named. Of more nodes without a majority none is: then it is the settings.
    """
    counts = Counter(values.values())
    if len(counts) < 2:
        return []
    usual, number = counts.most_common(1)[0]
    if 2 * number > len(values):
        rest = f"but {usual} on {number} of {len(values)} nodes"
        return [
            Problem(node, kind, f"{what} {value} on this node, {rest}. {remedy}")
            for node, value in values.items() if value != usual
        ]
    groups = ", ".join(
        f"{value} on {name_some([node for node, other in values.items() if other == value])}"
        for value, _ in counts.most_common(_MAX_NAMES)
    )
    text = f"{what} {groups}; no majority tells what is right. {remedy}"
    if len(values) == 2:
        return [Problem(node, kind, text, certain=False) for node in values]
    return [Problem(None, kind, text)]


def blame(kind: str, failing: Mapping[str, str], num_nodes: int, remedy: str) -> list[Problem]:
    """What is wrong by itself, whatever the others have; ``failing`` says it by node.

    Where more than half of ``num_nodes`` fail, the settings are to blame, and no node.
    """
    if 2 * len(failing) > num_nodes:
        text = next(iter(failing.values()))
        where = "every node" if len(failing) == num_nodes else f"{len(failing)} of {num_nodes} nodes"
        return [Problem(None, kind, f"{text}, on {where} ({name_some(list(failing))}). {remedy}")]
    rest = f"{len(failing)} of {num_nodes} nodes"
    return [Problem(node, kind, f"{text}, on {rest}. {remedy}") for node, text in failing.items()]


def name_some(nodes: Sequence[str]) -> str:
    """The first nodes by name, and how many more there are."""
    more = len(nodes) - _MAX_NAMES
    return ", ".join(nodes[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def format_bytes(num_bytes: int) -> str:
    """In GiB or MiB, for people."""
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.0f} MiB"
