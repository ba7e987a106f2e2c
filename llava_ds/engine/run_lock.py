"""One process group writes a run at a time: a lock file in its folder, held while rank 0 lives.

Slurm starts a job again while ranks of its last start may still live on a machine that was cut off. The new start takes
the lock from them, and they find that it is no longer theirs before they write a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from llava_ds.errors import CheckpointError, ConfigError

LOCK_FILE = "lock"
SUCCEEDS_VARIABLE = "LLAVA_DS_SUCCEEDS"
"""Of the environment: the job that this one was submitted to go on with."""
_PATIENCE_S = 20.0
_HOLDER_BYTES = 1024


class RunLock:
    """A held lock; ``release`` or the end of the process lets it go."""

    def __init__(self, file: IO[str], path: Path, holder: Mapping[str, Any]) -> None:
        self._file = file
        self._path = path
        self._holder = holder

    def check(self) -> None:
        """Raises CheckpointError when another start of the run has taken the lock since.

        Who holds it stands in the file: on some file systems locks do nothing, or hold on one machine only.
        """
        now = read_holder(self._path)  # empty where the folder was moved, and the lock with it
        if now and now.get("token") != self._holder["token"]:
            raise CheckpointError(
                f"another start of this run has taken over: {_describe(now)}; this one, {_describe(self._holder)}, "
                "writes nothing more"
            )

    def release(self) -> None:
        """Lets the lock go."""
        self._file.close()


def hold_run(run_dir: Path, environ: Mapping[str, str] = os.environ, patience_s: float = _PATIENCE_S) -> RunLock:
    """The lock of a run folder. Waits ``patience_s`` for an earlier start of the same job, then takes it over.

    Raises ConfigError when another run holds it, OSError when the folder cannot be written.
    """
    path = run_dir / LOCK_FILE
    deadline = time.monotonic() + patience_s
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            holder = read_holder(path)
            if not _precedes(holder, environ):
                raise _busy(run_dir, holder) from error
            if time.monotonic() < deadline:
                time.sleep(min(0.5, patience_s))
                continue
            print(f"{run_dir}: taken over from {_describe(holder)}, an earlier start of this job that still holds it")
            path.unlink()
            deadline = float("inf")
            continue
        except OSError as error:
            print(f"{run_dir} cannot be locked ({error}); a second run in it is found only when one of them saves")
            return _take(file, path, environ)
        if not _is_at(file, path):  # taken over between opening and locking
            file.close()
            continue
        return _take(file, path, environ)


def _take(file: IO[str], path: Path, environ: Mapping[str, str]) -> RunLock:
    holder = _self(environ)
    # One write of one length: who reads meanwhile finds the old holder or the new one.
    os.ftruncate(file.fileno(), _HOLDER_BYTES)
    with path.open("r+b", buffering=0) as writing:
        writing.write(json.dumps(holder).encode().ljust(_HOLDER_BYTES))
    return RunLock(file, path, holder)


def check_not_held(run_dir: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError when another run holds the folder; writes nothing."""
    path = run_dir / LOCK_FILE
    if not path.is_file():
        return
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = read_holder(path)
            if not _precedes(holder, environ):
                raise _busy(run_dir, holder) from error
        except OSError:
            return  # said when it is taken


def read_holder(path: Path) -> dict[str, Any]:
    """Who wrote a lock file last; empty where that is not known."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _self(environ: Mapping[str, str]) -> dict[str, Any]:
    job = {"job": environ["SLURM_JOB_ID"], "restart": _restart(environ)} if "SLURM_JOB_ID" in environ else {}
    return {"token": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), **job}


def _restart(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def _precedes(holder: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Whether the holder is an earlier start of this process's job, or of the job that it goes on with."""
    job = holder.get("job")
    if job is None:
        return False
    same = job == environ.get("SLURM_JOB_ID") and holder.get("restart", 0) < _restart(environ)
    return same or job == environ.get(SUCCEEDS_VARIABLE)


def _describe(holder: Mapping[str, Any]) -> str:
    if "host" not in holder:
        return "an unknown process"
    job = f", job {holder['job']} restart {holder['restart']}" if "job" in holder else ""
    return f"process {holder['pid']} on {holder['host']}{job}"


def _busy(run_dir: Path, holder: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"a run is being written to {run_dir} now, by {_describe(holder)}.\n"
        "  Choose another --run-dir, or stop that run first. Where it is long gone (NFS may keep the lock of a machine "
        f"that crashed), remove {run_dir / LOCK_FILE}."
    )


