"""What Slurm says of jobs. Nothing here raises: a cluster that does not answer leaves states unknown."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from typing import Literal

NOT_QUEUED = "NOT_QUEUED"
"""Stands in the place of a state: Slurm answered, and does not know the job (any more)."""
_JOB_ID = re.compile(r"\d+([_+]\d+)?")
_RUNS = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_WAITS = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}


def job_states(job_ids: Iterable[str], timeout_s: float = 10.0) -> dict[str, str]:
    """The state of each of these jobs of this user, like ``RUNNING`` or ``PENDING (Priority)``, or NOT_QUEUED.

    An element of an array is known by its own number and by ``ARRAY_ELEMENT``. A job that ended minutes ago may still
    have a state, like ``OUT_OF_MEMORY``. Empty when there is no Slurm, or it does not answer within ``timeout_s``.
    """
    known = sorted({job_id for job_id in job_ids if _JOB_ID.fullmatch(job_id)})
    text = _ask(known, timeout_s) if known else None
    if text is None:
        return {}
    states: dict[str, str] = {}
    for number, name, state in _parse_rows(text):
        for job_id in (number, name):
            if states.get(job_id, "PENDING").startswith("PENDING"):  # elements that wait share the array's number
                states[job_id] = state
    return {job_id: states.get(job_id, NOT_QUEUED) for job_id in known}


def place_in_queue(state: str) -> Literal["runs", "waits", "gone"]:
    """What a state of ``job_states`` means for a start of a run."""
    word = state.split(maxsplit=1)[0]
    return "runs" if word in _RUNS else "waits" if word in _WAITS else "gone"


def _ask(job_ids: Sequence[str], timeout_s: float) -> str | None:
    """What squeue prints; None when it does not know."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}",
               f"--jobs={','.join(job_ids)}", "--format=%A %i %T %r"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" in done.stderr:  # of a single job that is gone
        return ""
    return None if done.returncode else done.stdout


def _parse_rows(text: str) -> list[tuple[str, str, str]]:
    """(number, name, state) of each job; the reason of a job that waits stands with its state."""
    rows = []
    for line in text.splitlines():
        parts = line.split(maxsplit=3)
        if len(parts) >= 3:
            number, name, state, *reason = parts
            waits = state == "PENDING" and reason and reason[0] != "None"
            rows.append((number, name, f"{state} ({reason[0].strip('()')})" if waits else state))
    return rows
