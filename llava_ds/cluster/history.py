"""Why the starts of a run ended: every start with its end, what was decided then, and the failures of its ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_ds.cluster.rank_logs import format_ranks
from llava_ds.cluster.run_files import RunFiles, one_line, to_number
from llava_ds.errors import ConfigError
from llava_ds.starts import STARTS_FOLDER, End, Failure, Start, root_failure

_MAX_KINDS, _MAX_HOSTS = 8, 4


def explain_starts(run_dir: Path) -> Iterator[str]:
    """Lines that tell every start of a run, the first one first. Raises ConfigError when there is no such folder."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such folder; give the folder of a run (tools/jobs lists them)")
    run = RunFiles(run_dir)
    yield f"{one_line(run_dir)}: {len(run.starts)} start(s)"
    for start in run.starts:
        yield from _explain(run, start)
    if run.broken:
        yield f"cannot be read: {', '.join(run.broken)}"


def find_start(run_dir: Path, number: int | None = None) -> Path:
    """The folder of a start of a run, of the last one without ``number``. Raises ConfigError when it is not there."""
    starts = {start.number: start.folder for start in RunFiles(run_dir).starts}
    if not starts:
        raise ConfigError(f"{run_dir / STARTS_FOLDER}: no start of a run there; give the folder of a run")
    if number is not None and number not in starts:
        raise ConfigError(f"{run_dir} has no start {number}; it has {format_ranks(starts)}")
    return starts[max(starts) if number is None else number]


def _explain(run: RunFiles, start: Start) -> Iterator[str]:
    failures = run.read_failures(start)
    yield f"start {start.number}: {_describe_start(start)}"
    root = root_failure(failures)
    yield from _describe_end(start.end, root)
    kinds = _group(failures, root)
    for kind in kinds[:_MAX_KINDS]:
        yield from _describe_failures(kind, kind[0] is root)
    if len(kinds) > _MAX_KINDS:
        yield f"  and {len(kinds) - _MAX_KINDS} more kinds of failure, in {start.folder}"


def _describe_start(start: Start) -> str:
    facts = start.facts
    job = f"job {facts['job']} (restart {facts.get('restart', 0)})" if "job" in facts else "no job"
    where = facts.get("nodes") or facts.get("host") or "?"
    return one_line(f"{job} on {where}, {facts.get('num_ranks', '?')} ranks, {_clock(facts.get('time'))}")


def _describe_end(end: End | None, root: Failure | None) -> Iterator[str]:
    """Its message only where the root failure, which is told after it, does not say the same."""
    if end is None:
        yield "  no end is known: it runs, or was lost"
        return
    step = to_number(end.step)
    saved = "" if step is None else f", step {step:.0f} is saved" if step >= 0 else ", no step is saved"
    yield f"  {one_line(end.reason)} {_clock(end.time)}{saved}"
    if root is None or str(root.message) not in str(end.message):
        yield from _indent(str(end.message), 4)
    if end.decision:
        yield f"  decided: {one_line(end.decision)}{f' ({one_line(end.why)})' if end.why else ''}"


def _describe_failures(alike: Sequence[Failure], is_root: bool) -> Iterator[str]:
    """Failures of one kind; the first of all with its whole message."""
    first = alike[0]
    hosts = sorted({one_line(failure.host) for failure in alike})
    more = f" and {len(hosts) - _MAX_HOSTS} more" if len(hosts) > _MAX_HOSTS else ""
    ranks = format_ranks(failure.rank for failure in alike if isinstance(failure.rank, int))
    place = f"{'ranks' if len(alike) > 1 else 'rank'} {ranks or '?'} on {', '.join(hosts[:_MAX_HOSTS])}{more}"
    step = "" if first.step is None else f", {first.step} steps done"
    what, *rest = str(first.message).splitlines() or [""]
    error = f"{one_line(first.error)}: {one_line(what)}"
    yield f"  {'cause' if is_root else 'also'}: {place}{step}, {_clock(first.time)}: {error}"
    if is_root:
        yield from _indent("\n".join(rest), 4)


def _group(failures: Sequence[Failure], root: Failure | None) -> list[list[Failure]]:
    """Failures with the same words, the root first."""
    kinds: dict[tuple[str, str], list[Failure]] = {}
    for failure in sorted(failures, key=lambda failure: failure is not root):
        kinds.setdefault((str(failure.error), str(failure.message)), []).append(failure)
    return list(kinds.values())


def _indent(text: str, num: int) -> Iterator[str]:
    for line in text.splitlines():
        yield " " * num + "".join(letter if letter.isprintable() else " " for letter in line)


def _clock(value: object) -> str:
    """Local time."""
    seconds = to_number(value)
    return "?" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
