"""What a rank says of itself while it trains, and which rank the others wait for when nobody goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SAVING_FACTOR = 4
"""How many times as long a rank may stand still while it saves: a checkpoint may be large and a disk slow."""
# Innermost files of a stack that waits for other ranks.
_WAITING = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Beat:
    """One rank's sign of life. ``count`` are the phases that it entered since the start: the same on all ranks when
    they stand at the same place, as every rank goes through the same phases."""

    rank: int
    host: str
    count: int
    phase: str
    step: int
    still_s: float
    """Since it entered the phase."""
    samples: tuple[str, ...] = ()
    stack: str = ""
    """Of the main thread; only when it stands still for long."""


@dataclass(frozen=True)
class Hang:
    """The ranks that the others wait for, and a message that names them."""

    ranks: tuple[int, ...]
    message: str


def is_saving(phase: str) -> bool:
    """Whether a phase of the loop writes a checkpoint, by its name."""
    return phase.startswith("saving")


def find_hang(
    beats: Sequence[Beat], silent_s: Mapping[int, float], timeout_s: float, by_stack: bool = True
) -> Hang | None:
    """Who hangs when no rank has gone on for ``timeout_s``; None while one goes on.

    ``silent_s`` are the seconds since each rank's last beat. A rank without beats is stopped, or its machine cannot be
    reached. Among the others it is the one that entered fewest phases; where all stand in the same one, those whose
    stack does not wait for other ranks (``by_stack``).
    """
    silent = [beat for beat in beats if silent_s[beat.rank] > timeout_s]
    if silent:
        return _describe(silent, beats, timeout_s, "has given no sign of life", [silent_s[b.rank] for b in silent])
    if any(beat.still_s <= timeout_s * (SAVING_FACTOR if is_saving(beat.phase) else 1) for beat in beats):
        return None
    least = min(beat.count for beat in beats)
    behind = [beat for beat in beats if beat.count == least]
    if len(behind) == len(beats):
        busy = [beat for beat in beats if not _waits(beat.stack)]
        behind = busy if by_stack and 0 < len(busy) < len(beats) else []
    if not behind:
        return Hang((), f"all {len(beats)} rank(s) stand in the same place for {timeout_s:.0f} s: {_place(beats[0])}; "
                        f"no one is behind the others. Look at the network.{_stack(beats[0])}")
    return _describe(behind, beats, timeout_s, "has not gone on", [beat.still_s for beat in behind])


def _describe(
    hung: Sequence[Beat], beats: Sequence[Beat], timeout_s: float, what: str, seconds: Sequence[float]
) -> Hang:
    ranks = tuple(beat.rank for beat in hung)
    lines = [
        f"rank {beat.rank} on {beat.host} {what} for {since:.0f} s: {_place(beat)}{_stack(beat)}"
        for beat, since in list(zip(hung, seconds, strict=True))[:4]
    ]
    if len(hung) > 4:
        lines.append(f"and {len(hung) - 4} more ranks: {', '.join(map(str, ranks[4:20]))}")
    waiting = sorted({beat.phase for beat in beats if beat.rank not in ranks})
    if waiting:
        lines.append(f"The other {len(beats) - len(hung)} rank(s) wait: {', '.join(waiting)}. "
                     f"train.hang_timeout_s={timeout_s:g} is over, so the run ends.")
    return Hang(ranks, "\n  ".join(lines))


def _place(beat: Beat) -> str:
    samples = f", samples {', '.join(beat.samples[:16])}" if beat.samples else ""
    more = f" and {len(beat.samples) - 16} more" if len(beat.samples) > 16 else ""
    return f"step {beat.step}, {beat.phase}{samples}{more}"


def _stack(beat: Beat) -> str:
    return f"\n  Its stack:\n{beat.stack.rstrip()}" if beat.stack else ""


def _waits(stack: str) -> bool:
    """Whether one of the innermost frames waits for other ranks."""
    frames = [line for line in stack.splitlines() if line.lstrip().startswith("File ")]
    return any(part in line for line in frames[-6:] for part in _WAITING)
