"""Whether a run is running, waits to run again, or how it ended."""

from __future__ import annotations

import os
import socket
from typing import Literal, get_args

from llava_ds.cluster.run_files import RunFiles, to_number
from llava_ds.cluster.slurm_queue import place_in_queue
from llava_ds.constants import FINISHED_MARKER
from llava_ds.engine.run_lock import LOCK_FILE, read_holder
from llava_ds.starts import HANG, STARTS_FOLDER, Reason, Start, root_failure

State = Literal["running", "queued again", "finished", "stopped", "failed", "hung", "lost", "not started", "?"]


def find_state(run: RunFiles, slurm: str | None, step: int | None, silent: bool) -> State:
    """The state of a run. ``slurm`` is what Slurm says of its job (None: nothing is known), ``step`` the number of
    steps that are done, ``silent`` whether the run has written nothing for long.

    What the last start wrote down counts; Slurm is heard where that leaves it open.
    """
    if not run.starts:
        return _state_without_starts(run, step, silent)
    last, place = run.starts[-1], place_in_queue(slurm) if slurm else None
    if last.end is None:
        return _state_without_end(run, last, place)
    ended: State = last.end.reason if last.end.reason in get_args(Reason) else "?"
    if last.end.decision in ("done", "stop"):
        return ended
    again = last.end.decision == "resubmit" or (last.end.decision == "requeue" and place != "gone")
    return "queued again" if again or place == "waits" else ended


def _state_without_end(run: RunFiles, start: Start, place: str | None) -> State:
    if place == "waits":
        return "queued again"
    if place == "runs":
        return "running"
    if f"{STARTS_FOLDER}/{start.folder.name}/end.json" in run.broken:
        return "?"
    if os.path.exists(run.run_dir / FINISHED_MARKER):
        return "finished"
    root = root_failure(run.read_failures(start))
    if root:
        return "hung" if root.error == HANG else "failed"
    return "lost" if place == "gone" or _is_dead(run, start) else "running"


def _state_without_starts(run: RunFiles, step: int | None, silent: bool) -> State:
    """Of a run before starts were kept, or one that has only been prepared."""
    if os.path.exists(run.run_dir / FINISHED_MARKER):
        return "finished"
    if not run.record:
        return "?" if "run.json" in run.broken else "not started"
    num_steps = to_number(run.record.get("num_steps"))
    if num_steps is not None and (step or 0) >= num_steps:
        return "finished"
    return "lost" if silent else "running"


def _is_dead(run: RunFiles, start: Start) -> bool:
    """Whether a start outside Slurm was of a process of this machine that is gone."""
    holder = read_holder(run.run_dir / LOCK_FILE)
    pid = to_number(holder.get("pid"))
    here = holder.get("host") == socket.gethostname()
    return here and pid is not None and "job" not in start.facts and not os.path.exists(f"/proc/{int(pid)}")
