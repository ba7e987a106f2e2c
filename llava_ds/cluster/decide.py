"""What to do when a start of a run has ended: start it again, or stop and say why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from llava_ds.checkpoint.layout import list_steps, step_number
from llava_ds.constants import FINISHED_MARKER
from llava_ds.starts import Decision, Start, conclude, list_starts, read_failures, root_failure

MAX_SAME = 2
"""Failures of the same kind in a row without a new checkpoint after which a job is not started again."""
MAX_IDLE = 5
"""Starts of any kind in a row without a new checkpoint."""
SETTINGS_PROBLEM, BAD_NODES = "SettingsProblem", "BadNodes"
"""The ``error`` of failures that the preflight found."""
SETTINGS_ERRORS = ("ConfigError", "BackendUnavailableError", SETTINGS_PROBLEM)
"""What is as wrong the next time: settings are the same on every start."""

OF_PEERS = "a rank is gone"
"""The kind of a failure of which only other ranks tell, each in its words."""


@dataclass(frozen=True)
class Past:
    """One start that is over. ``began_at`` is the last committed step when it began, -1 before the first."""

    reason: str
    signature: str
    began_at: int
    settings: bool = False
    """Whether it ended for its settings."""
    bad_nodes: bool = False
    """Whether it ended because the preflight named nodes."""


def decide(past: Sequence[Past], step: int, exclude: bool = False) -> tuple[Decision, str]:
    """Whether to start again, and why. ``past`` are the starts of a job; ``step`` is the last committed one now.

    With ``exclude`` a job is submitted anew without the nodes that the preflight named.
    """
    last = past[-1]
    if last.reason == "finished":
        return "done", "all steps are done"
    if last.settings:
        return "stop", "its settings are wrong, so every start would end like this one"
    # The save before step 1 is no progress.
    idle = list(takewhile(lambda one: max(0, one.began_at) >= max(0, step), reversed(past)))
    same = len(list(takewhile(lambda one: one.signature == last.signature, idle)))
    where = f"step {step} is the last that is saved" if step > 0 else "no step is done and saved yet"
    if last.bad_nodes and not exclude:
        return "stop", "nodes are named as bad: set LLAVA_EXCLUDE_BAD_NODES=1, or submit it with --exclude"
    if last.reason in ("failed", "hung") and same >= MAX_SAME and not last.bad_nodes:
        return "stop", f"it {last.reason} the same way {same} times in a row without a new checkpoint; {where}"
    if len(idle) >= MAX_IDLE:
        reasons = ", ".join(one.reason for one in reversed(idle))
        return "stop", f"{len(idle)} starts in a row ({reasons}) came to nothing: {where}"
    if last.bad_nodes:
        return "resubmit", f"without the nodes that are named as bad; {where}"
    was = "was " if last.reason in ("stopped", "lost") else ""
    return "requeue", f"it {was}{last.reason}; {where}"


def decide_for(run_dir: Path, facts: Mapping[str, Any], exclude: bool = False) -> tuple[Decision, str]:
    """What to do after the last start of a job, which is over; ``facts`` are that start's.

    Raises ValueError when the job has not started this run.
    """
    starts = of_one_job(list_starts(run_dir), facts)
    if not starts:
        raise ValueError(f"{run_dir}: job {facts.get('job')} has no start of it")
    return decide([describe_past(start) for start in starts[-MAX_IDLE:]], last_step(run_dir), exclude)


def describe_past(start: Start) -> Past:
    """A start that is over, as the decision sees it."""
    end, began_at = conclude(start.folder), int(start.facts.get("step", -1))
    failure = root_failure(read_failures(start.folder))
    if failure is None or end.reason in ("finished", "stopped"):
        return Past(end.reason, signature(end.reason, end.message), began_at)
    kind = OF_PEERS if failure.of_peer else signature(failure.error, failure.message)
    return Past(end.reason, kind, began_at, failure.error in SETTINGS_ERRORS, failure.error == BAD_NODES)


def signature(error: str, message: str) -> str:
    """What failures of one kind have in common: the type, and the first line without its numbers."""
    first = next(iter(message.strip().splitlines()), "")
    return f"{error}: {re.sub(r'[0-9]+', '#', first)}"


def of_one_job(starts: Sequence[Start], facts: Mapping[str, Any]) -> list[Start]:
    """The starts of a job and of those that it was submitted to go on with, the first one first."""
    jobs = {facts.get("job"), facts.get("succeeds")} - {None}
    found = []
    for start in reversed(starts):
        if start.facts.get("job") in jobs:
            found.append(start)
            jobs |= {start.facts.get("succeeds")} - {None}
    return found[::-1]


def last_step(run_dir: Path) -> int:
    """The last committed step; -1 where there is none."""
    steps = list_steps(run_dir)
    return step_number(steps[-1]) if steps else -1


def is_finished(run_dir: Path) -> bool:
    """Whether all steps of the run are done and saved."""
    return (run_dir / FINISHED_MARKER).is_file()
