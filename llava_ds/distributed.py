"""Ranks: where this process stands, and how ranks wait for one another and agree.

The same script starts under ``deepspeed``, ``torchrun``, plain ``srun`` and as a single process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from llava_ds.errors import ConfigError

T = TypeVar("T")

_SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0


def apply_launcher_environment(environ: MutableMapping[str, str]) -> Ranks:
    """Fills RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and returns them.

    Taken as they are when a launcher set them; from Slurm's variables under ``srun``; otherwise one rank.
    Raises ConfigError when only some of them are set, or when Slurm started several ranks without an address.
    """
    required = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in environ and "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        missing = [name for name in _SLURM_NAMES.values() if name not in environ]
        if missing:
            raise ConfigError(
                f"this is a step of Slurm, but {', '.join(missing)} is not set; start every rank with srun itself"
            )
        environ.update({name: environ[slurm_name] for name, slurm_name in _SLURM_NAMES.items()})
        environ.setdefault("MASTER_PORT", str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000))
        if environ["WORLD_SIZE"] == "1":
            environ.setdefault("MASTER_ADDR", "127.0.0.1")
        missing = [name for name in required if name not in environ]
        if missing:
            raise ConfigError(
                f"srun started {environ['WORLD_SIZE']} ranks, but {', '.join(missing)} is not set.\n"
                "  Export MASTER_ADDR=$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | head -n 1) before srun."
            )
    elif "RANK" not in environ:
        environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        environ["MASTER_PORT"] = str(free_port())
    missing = [name for name in required if name not in environ]
    if missing:
        raise ConfigError(f"RANK is set but {', '.join(missing)} is not; start with deepspeed, torchrun or srun")
    environ.setdefault("LOCAL_RANK", environ["RANK"])
    return Ranks(int(environ["RANK"]), int(environ["LOCAL_RANK"]), int(environ["WORLD_SIZE"]))


def run_on_main_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 while the others wait, then on the others; an error on rank 0 reaches all.

    ``work`` must be idempotent: the other ranks find what rank 0 made.
    """
    if ranks.world_size == 1:
        return work()
    # A group of its own: this work may take hours, while a collective of training that does is stuck.
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    failure: list[str | None] = [None]
    result: list[T] = []
    error: Exception | None = None
    if ranks.is_main:
        try:
            result.append(work())
        except Exception as caught:
            error, failure[0] = caught, f"{type(caught).__name__}: {caught}"
    dist.broadcast_object_list(failure, src=0, group=patient)
    dist.destroy_process_group(patient)
    if error is not None:
        raise error
    if failure[0] is not None:
        raise ConfigError(f"rank 0 failed, so rank {ranks.rank} stops: {failure[0]}")
    return result[0] if ranks.is_main else work()


def flush_and_exit(code: int) -> None:
    """Ends the process at once.

    gloo's background thread can abort a process during interpreter finalisation, after all work is done;
    without a finalisation there is nothing to abort.
    """
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
