"""What a batch script does before and after its ranks run; slurm/common.sh calls it.

    python -m llava_ds.cluster.batch begin RUN             prints the folder of the new start
    python -m llava_ds.cluster.batch refuse RUN MESSAGE    the start ends before it began: something is missing
    python -m llava_ds.cluster.batch preflight RUN CODE    the preflight of the last start ended with this exit code
    python -m llava_ds.cluster.batch end RUN CODE          srun did; prints done, requeue, resubmit NODE,NODE or stop;
                                                           --noticed: the batch script had got a signal;
                                                           --left-to-slurm: Slurm is ending the job
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_ds.cluster.decide import (
    BAD_NODES,
    MAX_IDLE,
    SETTINGS_PROBLEM,
    decide,
    decide_for,
    describe_past,
    is_finished,
    last_step,
    of_one_job,
)
from llava_ds.engine.run_lock import SUCCEEDS_VARIABLE
from llava_ds.errors import ConfigError
from llava_ds.starts import (
    START_VARIABLE,
    End,
    Failure,
    Start,
    begin_start,
    conclude_earlier,
    conclude_from_ranks,
    list_starts,
    note_failure,
    read_failures,
    read_start,
    slurm_facts,
    write_end,
)

RANKS_VARIABLE = "LLAVA_RANKS"
EXCLUDE_VARIABLE = "LLAVA_EXCLUDE_BAD_NODES"
PREFLIGHT_REPORT = "preflight.json"


def begin(run_dir: Path, environ: Mapping[str, str]) -> Path:
    """Makes the folder of a new start.

    Raises ConfigError when the job's starts before it say that it has to stop, whoever started it again.
    """
    facts: dict[str, Any] = {"step": last_step(run_dir), **slurm_facts(environ)}
    if environ.get(RANKS_VARIABLE):
        facts["num_ranks"] = int(environ[RANKS_VARIABLE])
    if environ.get(SUCCEEDS_VARIABLE):
        facts["succeeds"] = environ[SUCCEEDS_VARIABLE]
    before = of_one_job(list_starts(run_dir), facts)
    folder = begin_start(run_dir, facts)
    conclude_earlier(folder, {start.facts["job"] for start in before})
    if before:
        decision, why = decide([describe_past(start) for start in before[-MAX_IDLE:]], last_step(run_dir),
                               environ.get(EXCLUDE_VARIABLE) == "1")
        if decision == "stop":
            write_end(folder, End("failed", why, last_step(run_dir), "stop", why))
            raise ConfigError(f"{run_dir} is not started again: {why}.\n  See tools/jobs why {run_dir}")
    return folder


def refuse(run_dir: Path, message: str, environ: Mapping[str, str]) -> None:
    """Records a start that ends before it began."""
    folder = begin_start(run_dir, slurm_facts(environ))
    note_failure(folder, Failure(0, SETTINGS_PROBLEM, message))
    write_end(folder, End("failed", message, last_step(run_dir), "stop", "what it needs is not there"))


def own_start(run_dir: Path, environ: Mapping[str, str]) -> Start:
    """The start that the batch script began: another job may have begun one on the same folder since."""
    given = environ.get(START_VARIABLE)
    return read_start(Path(given)) if given else list_starts(run_dir)[-1]


def note_preflight(start: Start, code: int) -> None:
    """Records that the preflight of a start failed, as its report says."""
    report = _read_report(start)
    problems = report.get("problems", [])
    messages = [f"{problem['node'] or 'all nodes'}: {problem['message']}" for problem in problems]
    if not messages:
        message = f"it ended with exit code {code}; see preflight-rank-*.log in {start.folder}"
        note_failure(start.folder, Failure(0, "Preflight", message))
        return
    error = SETTINGS_PROBLEM if report.get("code") == 1 else BAD_NODES if report.get("bad_nodes") else "SuspectNodes"
    note_failure(start.folder, Failure(0, error, "\n".join(messages)))


def end(
    run_dir: Path,
    start: Start,
    code: int,
    environ: Mapping[str, str],
    noticed: bool = False,
    left_to_slurm: bool = False,
) -> End:
    """Records how a start ended, and what is to be done now.

    ``code`` is srun's. ``noticed``: the batch script had got a signal. ``left_to_slurm``: Slurm is ending the job, or
    has started it elsewhere, so nothing is to be decided; whether the run is finished says nothing of this start then.
    """
    # Another start may have taken this one for lost while its ranks were still to speak.
    told = start.end if start.end and start.end.reason != "lost" else conclude_from_ranks(start.folder)
    found = End("finished") if is_finished(run_dir) and not left_to_slurm else told
    if found.reason == "lost" and noticed:
        found = replace(found, message="it was ended by a signal before it could save")
    elif found.reason == "lost":
        message = f"no rank said why it ended; srun's exit code was {code}. The batch script's output may say more"
        found = End("failed" if code else "lost", message)
    step = start.end.step if left_to_slurm and start.end else last_step(run_dir)
    write_end(start.folder, replace(found, step=step))
    exclude = environ.get(EXCLUDE_VARIABLE) == "1"
    decision, why = decide_for(run_dir, start.facts, exclude)
    ended = replace(found, step=step, decision=decision, why=why)
    if left_to_slurm and found.reason != "finished":
        why = "Slurm ends the job: it was cancelled, or Slurm starts it again by itself"
        ended = replace(ended, decision=None, why=why)
    write_end(start.folder, ended)
    return ended


def _read_report(start: Start) -> dict[str, Any]:
    try:
        return dict(json.loads((start.folder / PREFLIGHT_REPORT).read_text()))
    except (OSError, ValueError):
        return {}


def main() -> None:
    """The commands above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("begin", "refuse", "preflight", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("value", nargs="?", default="0")
    parser.add_argument("--noticed", action="store_true")
    parser.add_argument("--left-to-slurm", action="store_true")
    asked = parser.parse_args()
    run_dir = asked.run_dir
    try:
        if asked.what == "begin":
            print(begin(run_dir, os.environ))
        elif asked.what == "refuse":
            refuse(run_dir, asked.value, os.environ)
        elif asked.what == "preflight":
            note_preflight(own_start(run_dir, os.environ), int(asked.value))
        else:
            start = own_start(run_dir, os.environ)
            _tell(start, end(run_dir, start, int(asked.value), os.environ, asked.noticed, asked.left_to_slurm))
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    except OSError as error:
        sys.exit(f"{run_dir} cannot be written: {error}\n  Choose another LLAVA_RUNS, or make room.")


def _tell(start: Start, ended: End) -> None:
    for failure in read_failures(start.folder)[:8]:
        print(f"rank {failure.rank} on {failure.host}: {failure.error}: {failure.message}", file=sys.stderr)
    print(f"start {start.number} {ended.reason}: {ended.message or ended.why}", file=sys.stderr)
    print(f"decision: {ended.decision}, {ended.why}", file=sys.stderr)
    print(ended.decision or "stop", ",".join(_read_report(start).get("bad_nodes", [])))


if __name__ == "__main__":
    main()
