"""What became of every start of a run: folders ``RUN/starts/0001/``, ``0002/``, ... of logs, failures and ends.

A start is one launch of all ranks on a run folder. The folder says who started it (``start.json``), what each rank
printed (``rank-00003.log``), which ranks failed (``failed-00003.json``) and how it ended (``end.json``). Nothing here
needs more than the standard library: a batch script's own Python can read and write it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

STARTS_FOLDER = "starts"
START_VARIABLE = "LLAVA_DS_START"
"""Of the environment: the folder of this start, where a batch script made it before the ranks began."""

HANG = "Hang"
"""The ``error`` of a failure that the watchdog found."""

Reason = Literal["finished", "stopped", "failed", "hung", "lost"]
"""``stopped``: by a signal, after a checkpoint. ``hung``: by the watchdog. ``lost``: without a word, as a machine that
loses its power does."""
Decision = Literal["done", "requeue", "resubmit", "stop"]


@dataclass(frozen=True)
class Failure:
    """Why one rank ended. ``of_peer``: it only says that another rank is gone."""

    rank: int
    error: str
    """The type of the exception, or ``signal``."""
    message: str
    step: int | None = None
    """Steps that were done then."""
    of_peer: bool = False
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class End:
    """How a start ended, and what was decided then."""

    reason: Reason
    message: str = ""
    step: int | None = None
    """The last committed step."""
    decision: Decision | None = None
    why: str = ""
    """Of the decision."""
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Start:
    """One start, as its folder tells it; ``end`` is None while it runs (or when it was lost)."""

    folder: Path
    facts: Mapping[str, Any]
    """``job``, ``restart``, ``nodes``, ``num_ranks``, ``host``, ``time``; what is not known is missing."""
    end: End | None

    @property
    def number(self) -> int:
        """1 for the first start of a run."""
        return int(self.folder.name)


def begin_start(run_dir: Path, facts: Mapping[str, Any]) -> Path:
    """Makes the folder of a new start and returns it. Raises OSError when the run folder cannot be written."""
    starts = list_starts(run_dir)
    folder = run_dir / STARTS_FOLDER / f"{starts[-1].number + 1 if starts else 1:04d}"
    folder.mkdir(parents=True)
    _write(folder / "start.json", {"host": socket.gethostname(), "time": time.time(), **facts})
    return folder


def conclude_earlier(folder: Path, jobs: Collection[str] | None = None) -> None:
    """Records how the starts before this one ended that have no end: those of ``jobs``, or all.

    All are over only when this start holds the run's lock. Raises OSError when they cannot be written.
    """
    for start in list_starts(folder.parents[1]):
        if start.number < int(folder.name) and start.end is None and (jobs is None or start.facts.get("job") in jobs):
            write_end(start.folder, conclude(start.folder))


def slurm_facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """What Slurm's variables say of this start; nothing outside a job."""
    if "SLURM_JOB_ID" not in environ:
        return {}
    return {
        "job": environ["SLURM_JOB_ID"],
        "restart": int(environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": environ.get("SLURM_JOB_NODELIST", ""),
    }


def list_starts(run_dir: Path) -> list[Start]:
    """The starts of a run, the first one first."""
    parent = run_dir / STARTS_FOLDER
    folders = [folder for folder in parent.iterdir() if folder.name.isdecimal()] if parent.is_dir() else []
    return [read_start(folder) for folder in sorted(folders, key=lambda folder: int(folder.name))]


def read_start(folder: Path) -> Start:
    """One start, by its folder."""
    return Start(folder, _read(folder / "start.json") or {}, read_end(folder))


def note_failure(folder: Path, failure: Failure) -> None:
    """Keeps why a rank ended; its first failure stays. Raises OSError when it cannot be written."""
    file = folder / f"failed-{failure.rank:05d}.json"
    if not file.exists():
        _write(file, asdict(failure))


def read_failures(folder: Path) -> list[Failure]:
    """Why ranks ended, in the order of time."""
    raw = [_read(file) for file in folder.glob("failed-*.json")]
    failures = [Failure(**_known(Failure, failure)) for failure in raw if failure]
    return sorted(failures, key=lambda failure: failure.time)


def root_failure(failures: Sequence[Failure]) -> Failure | None:
    """The one that the others follow from: the first that is not only about another rank."""
    return next((failure for failure in failures if not failure.of_peer), failures[0] if failures else None)


def write_end(folder: Path, end: End) -> None:
    """Keeps how a start ended, in the place of what was known before. Raises OSError when it cannot be written."""
    _write(folder / "end.json", asdict(end))


def read_end(folder: Path) -> End | None:
    """How a start ended; None when that is not known."""
    raw = _read(folder / "end.json")
    return End(**_known(End, raw)) if raw else None


def conclude(folder: Path) -> End:
    """How a start ended that is over: what was recorded, or what the failures of its ranks say."""
    return read_end(folder) or conclude_from_ranks(folder)


def conclude_from_ranks(folder: Path) -> End:
    """How a start ended that is over, as the failures of its ranks say."""
    failure = root_failure(read_failures(folder))
    if failure is None:
        return End("lost", "it ended without a word: a machine, or its whole job, was killed")
    if failure.error == HANG:
        return End("hung", failure.message, failure.step)
    who = f"rank {failure.rank} on {failure.host}"
    if failure.of_peer:
        who = f"a rank is gone without a word, as {who} says"
    return End("failed", f"{who}: {failure.error}: {failure.message}", failure.step)


def rank_log(folder: Path, rank: int) -> Path:
    """Where the output of a rank stands."""
    return folder / f"rank-{rank:05d}.log"


def _write(file: Path, value: Mapping[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(file)


def _known(kind: type[End] | type[Failure], raw: Mapping[str, Any]) -> dict[str, Any]:
    """What this version knows of a record that another one may have written."""
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in raw.items() if name in names}


def _read(file: Path) -> dict[str, Any] | None:
    """What a file holds; None when it is not there, or cut off."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
