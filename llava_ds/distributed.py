"""Ranks: where this process stands, and how ranks wait for one another and agree.

The same script starts under ``deepspeed``, ``torchrun``, plain ``srun`` and as a single process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llava_ds.errors import BackendUnavailableError, ConfigError

T = TypeVar("T")


class PeerFailedError(ConfigError):
    """Another rank failed, so this one ends; the other one says why."""


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


def join_ranks() -> Ranks:
    """The ranks of this launch; several meet in a gloo group, in which they exchange objects.

    Raises ConfigError as ``apply_launcher_environment`` does.
    """
    environ = dict(os.environ)
    ranks = apply_launcher_environment(environ)
    if ranks.world_size > 1:
        os.environ.update(environ)
        dist.init_process_group("gloo")
    return ranks


def select_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU where there is none (or ``DS_ACCELERATOR=cpu`` asks for it).

    Raises BackendUnavailableError, on the ranks that have none, when a machine has more ranks than GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Slurm may bind each rank to one GPU (--gpus-per-task=1), which is number 0 there.
    num_devices = torch.cuda.device_count()
    index = 0 if num_devices == 1 else ranks.local_rank
    if index >= num_devices:
        raise BackendUnavailableError(
            f"rank {ranks.rank} is number {ranks.local_rank} of its machine, which shows it {num_devices} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}).\n  Start as many ranks as GPUs."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def run_on_main_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 while the others wait, then on the others; an error on any rank reaches all.

    ``work`` must be idempotent: the other ranks find what rank 0 made.
    """
    if ranks.world_size == 1:
        return work()
    result, error = _attempt(work) if ranks.is_main else (None, None)
    _share_failure(ranks, error)
    if not ranks.is_main:
        result, error = _attempt(work)
    _share_failure(ranks, error)
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _share_failure(ranks: Ranks, error: Exception | None) -> None:
    failures = gather_objects(ranks, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise PeerFailedError(f"rank {rank} failed, so rank {ranks.rank} stops: {failure}")


def gather_objects(ranks: Ranks, value: Any) -> list[Any]:
    """[world_size] the value of every rank, on every rank. Waits for days, where a collective of training does not."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=_patient_group())
    return values


@cache
def _patient_group() -> Any:
    """Made once: at a thousand ranks that takes seconds."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def run_on_main_alone(ranks: Ranks, work: Callable[[], T]) -> T | None:
    """Runs ``work`` on rank 0, which keeps its result; the others get None. An error there reaches all."""
    result, error = _attempt(work) if ranks.is_main else (None, None)
    _share_failure(ranks, error)
    return result


def run_on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 and gives its result, which must be picklable, to all; an error there reaches all."""
    return gather_objects(ranks, run_on_main_alone(ranks, work))[0]


def run_on_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """[world_size] what ``work`` gives on every rank, on every rank.

    An error on one rank reaches all, after the others have done their work.
    """
    result, error = _attempt(work)
    _share_failure(ranks, error)
    return gather_objects(ranks, result)


def check_agreement(ranks: Ranks, what: str, value: str) -> None:
    """Raises ConfigError on every rank, naming the ranks that differ from rank 0, unless all have the same value."""
    values = gather_objects(ranks, value)
    differing = [rank for rank, other in enumerate(values) if other != values[0]]
    if differing:
        raise ConfigError(
            f"{what} differ between ranks: rank 0 has {values[0]}, rank {differing[0]} has {values[differing[0]]}"
            f" ({len(differing)} rank(s) differ: {', '.join(map(str, differing[:8]))}).\n"
            "  Look whether every machine sees the same files."
        )


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
