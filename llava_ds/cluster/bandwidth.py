"""Whether all nodes add up numbers together without a mistake, and how fast each one exchanges them with others.

An all-reduce is as slow as its slowest node, so it names none. Pairs do: in every round each node exchanges with one
other, with another one in the next round, and its rate is that of its best round. The first GPU of each node is used,
with NCCL, or else the CPU, with gloo.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from llava_ds.distributed import Ranks
from llava_ds.errors import BackendUnavailableError

_MIB = 1 << 20
_WARM_UP_BYTES = 2 * _MIB
_MAX_BYTES = 128 * _MIB
_ALL_REDUCE_S = 0.4
_PAIR_S = 0.1
"""What one exchange of a pair should take; there are two in a round."""
_MAX_ROUNDS = 4
_PERIOD = 251
"""Of the numbers that are added: with a thousand ranks their sums are whole numbers below 2^24, exact in fp32."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class LinkRates:
    """What one rank measured. All rates are in bytes per second, each way."""

    all_reduce_bytes_per_s: float
    """What a link of a ring carries: 2 (N - 1) / N of the tensor's bytes by the time of the slowest rank."""
    pairs: list[tuple[int, float]] = field(default_factory=list)
    """The rank of each partner, and the rate with it."""
    wrong_sum: str = ""
    """The first number that was not the sum; empty where all were."""


def pick_device() -> torch.device:
    """The first GPU, or the CPU where there is none (or ``DS_ACCELERATOR=cpu`` asks for it)."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


def measure_links(ranks: Ranks, store: dist.Store, limit_s: float, note: Note = lambda stage: None) -> LinkRates:
    """Measures with all ranks, each on a node of its own, in some seconds; ``note`` is told what is next.

    Raises RuntimeError (of PyTorch) when a connection fails. May hang for longer than ``limit_s``: call it in a thread.
    """
    note("starting the device")
    device = pick_device()
    _start_device(device)
    note("connecting all nodes")
    _connect(ranks, store, device, limit_s)
    note("all-reduce")
    rate, wrong = _measure_all_reduce(ranks, device)
    pair_bytes = _fit(rate * _PAIR_S)
    pairs = []
    for number, partner in enumerate(plan_partners(ranks.rank, ranks.world_size), start=1):
        note(f"exchange {number} " + ("without a partner" if partner is None else f"with rank {partner}"))
        if partner is not None:
            pairs.append((partner, _measure_pair(partner, pair_bytes, device)))
    return LinkRates(rate, pairs, wrong)


def _start_device(device: torch.device) -> None:
    """A broken GPU hangs here, before any other node waits for it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.ones(1, device=device).sum().item()


def _connect(ranks: Ranks, store: dist.Store, device: torch.device, limit_s: float) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        raise BackendUnavailableError("this PyTorch has CUDA but no NCCL; install one with NCCL, as on the other nodes")
    dist.init_process_group(
        backend, store=dist.PrefixStore("links", store), rank=ranks.rank, world_size=ranks.world_size,
        timeout=timedelta(seconds=2 * limit_s),  # who waits for whom is told sooner, and better, by the stages
    )


def _measure_all_reduce(ranks: Ranks, device: torch.device) -> tuple[float, str]:
    """Bytes per second of a ring's link, and the first wrong sum. The first call connects, the second one is timed to
    choose the size of the third: a second at most, on slow networks too."""
    _, wrong = _all_reduce(ranks, 4096, device)
    seconds, wrong_too = _all_reduce(ranks, _WARM_UP_BYTES, device)
    num_bytes = _fit(_WARM_UP_BYTES / seconds * _ALL_REDUCE_S)
    wrong = wrong or wrong_too
    if num_bytes > _WARM_UP_BYTES:
        seconds, wrong_too = _all_reduce(ranks, num_bytes, device)
    else:
        num_bytes = _WARM_UP_BYTES
    return num_bytes * 2 * (ranks.world_size - 1) / ranks.world_size / seconds, wrong or wrong_too


def _all_reduce(ranks: Ranks, num_bytes: int, device: torch.device) -> tuple[float, str]:
    """Seconds of the slowest rank, and the first wrong sum."""
    numbers = torch.arange(num_bytes // 4, device=device, dtype=torch.float32).remainder_(_PERIOD)
    expected = numbers * ranks.world_size + sum(range(ranks.world_size))
    numbers += ranks.rank
    _finish(device)
    started = time.perf_counter()
    dist.all_reduce(numbers)
    _finish(device)
    seconds = torch.tensor(time.perf_counter() - started, device=device, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return max(float(seconds), 1e-9), _first_difference(numbers, expected)


def _first_difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    places = (found != expected).nonzero()
    if not len(places):
        return ""
    place = int(places[0])
    return f"{len(places)} of {len(found)} sums are wrong, the first at {place}: {found[place]} for {expected[place]}"


def _measure_pair(partner: int, num_bytes: int, device: torch.device) -> float:
    """Bytes per second each way, the better of two. The clock starts when the partner is there."""
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    into = torch.empty_like(out)
    _exchange(partner, out[:1], into[:1], device)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        _exchange(partner, out, into, device)
        times.append(time.perf_counter() - started)
    return num_bytes / max(min(times), 1e-9)


def _exchange(partner: int, out: torch.Tensor, into: torch.Tensor, device: torch.device) -> None:
    both = [dist.P2POp(dist.isend, out, partner), dist.P2POp(dist.irecv, into, partner)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    _finish(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fit(num_bytes: float) -> int:
    """Whole MiB, neither too little to measure nor too much to hold."""
    return max(1, min(int(num_bytes), _MAX_BYTES) // _MIB) * _MIB


def plan_partners(rank: int, world_size: int, max_rounds: int = _MAX_ROUNDS) -> list[int | None]:
    """Whom a rank exchanges with in each round, never the same one twice; None is a round without a partner.

    The circle method of tournaments: all pairs of a round are apart, so a slow one delays no other.
    """
    circle = world_size - 1 + world_size % 2  # odd; with an even number of ranks the last one stands in the middle
    partners = []
    for number in range(min(max_rounds, circle)):
        if rank == circle:
            partner = number * (circle + 1) // 2 % circle  # the one whose mirror image is itself
        else:
            partner = (number - rank) % circle
            partner = circle if partner == rank else partner
        partners.append(partner if partner < world_size else None)
    return partners


def find_slow(rates: Mapping[str, float], slow_frac: float = 0.5, min_bytes_per_s: float = 0.0) -> list[str]:
    """The nodes below ``slow_frac`` of the median rate, or below ``min_bytes_per_s``; rates are by node.

    Two nodes have one link: they are slow together or not at all.
    """
    if not rates:
        return []
    limit = max(statistics.median(rates.values()) * slow_frac, min_bytes_per_s)
    slow = [node for node, rate in rates.items() if rate < limit]
    return list(rates) if slow and len(rates) == 2 else slow
