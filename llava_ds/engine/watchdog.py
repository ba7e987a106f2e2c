"""Finds a rank that hangs, names it with its step, samples and stack, and ends the run on all ranks.

Every rank has a thread that posts a ``Beat`` in a store of its own on rank 0's machine; the collectives of training
are not used. Rank 0 reads them all. When nobody has gone on for ``hang_timeout_s`` it says who the others wait for. A
rank that gets no sign of life from rank 0 for as long says that.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from llava_ds.distributed import Ranks, gather_objects
from llava_ds.engine.beats import Beat, Hang, find_hang, is_saving
from llava_ds.engine.preemption import StopNotice

EXIT_HUNG = 86
"""The exit code of every rank when one hangs."""
_TERM_GRACE_S = 10.0
_TICK_S = 0.5
_INNERMOST = 14


@dataclass
class Watchdog:
    """Watches this rank, and on rank 0 all of them, from ``start`` to ``stop``.

    ``name_sample`` gives the id of a record by its number; it is called only for a report. ``on_end`` hears why the run
    ends, on this rank, before the process ends: (ranks that hang, message, steps that are done).
    """

    ranks: Ranks
    hang_timeout_s: float
    notice: StopNotice
    name_sample: Callable[[int], str]
    on_end: Callable[[Sequence[int], str, int], None]
    by_stack: bool = True
    """Whether stacks tell who waits for other ranks, where all stand in the same phase."""
    exit: Callable[[int], Any] = os._exit
    _main: int = field(default_factory=threading.get_ident)
    _now: tuple[int, str, int, float, Sequence[int | str]] = (0, "before the first step", 0, 0.0, ())
    _longest_s: float = 0.0
    _floor: float = 0.0
    """Nothing stands still for longer than since then: before, this process did not run."""
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to watch. Collective; the main thread calls it."""
        self._enter(0, "before the first step", ())
        store = self._open_store()
        self._thread = threading.Thread(target=self._watch, args=(store,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._thread:
            self._thread.join(timeout=10)

    def enter(self, phase: str, step: int, samples: Sequence[int | str] = ()) -> None:
        """This rank goes on to another phase of a step; all ranks go through the same ones.

        ``samples`` are what it works on: ids, or numbers of records where the ids are not known yet.
        """
        self._longest_s = max(self._longest_s, time.monotonic() - self._now[3])
        self._enter(step, phase, samples)

    def wants_stop(self) -> bool:
        """Whether this rank was asked to end."""
        return self.notice.asked()

    def _enter(self, step: int, phase: str, samples: Sequence[int | str]) -> None:
        self._now = (self._now[0] + 1, phase, step, time.monotonic(), samples)
        # Written by a thread of C: also when the main thread hangs with the interpreter's lock held.
        faulthandler.dump_traceback_later(self.hang_timeout_s * 0.9, file=sys.__stderr__ or sys.stderr)

    def _open_store(self) -> dist.TCPStore:
        host, patience = os.environ["MASTER_ADDR"], timedelta(seconds=max(10.0, self.hang_timeout_s / 4))
        store = None
        if self.ranks.is_main:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            for key in ("verdict", *(_key(rank) for rank in range(self.ranks.world_size))):
                store.set(key, "")
        port = gather_objects(self.ranks, store.port if store else None)[0]
        return store or dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)

    def _watch(self, store: dist.TCPStore) -> None:
        interval = min(5.0, self.hang_timeout_s / 10)
        heard = _Heard(self.ranks.world_size if self.ranks.is_main else 1)
        next_beat, last = 0.0, time.monotonic()
        while not self._stopped.wait(min(_TICK_S, interval)):
            if time.monotonic() - last > 5 + 2 * interval:  # the whole job was suspended: a new start for all
                self._floor = time.monotonic()
                heard.forgive()
            last = time.monotonic()
            self._end_when_left_alone()
            if time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + interval
            hang = self._exchange(store, heard)
            last = time.monotonic()  # a store that does not answer is no suspension
            if hang and not self._stopped.is_set():
                self._end(hang)

    def _exchange(self, store: dist.TCPStore, heard: _Heard) -> Hang | None:
        """Posts this rank's beat and reads the others'; what is wrong, if anything is."""
        try:
            store.set(_key(self.ranks.rank), json.dumps(asdict(self._beat())))
            verdict, *raw = store.multi_get(["verdict", *(_key(rank) for rank in range(heard.num_ranks))])
            heard.note(raw)
        except (RuntimeError, ValueError):  # torch has several types for a store that does not answer
            verdict = b""
        if verdict:
            said = json.loads(verdict)
            return Hang(tuple(said["ranks"]), said["message"])
        if self.ranks.is_main:
            hang = find_hang(heard.beats(), heard.silent_s(), self.hang_timeout_s, self.by_stack)
            if hang:
                store.set("verdict", json.dumps(asdict(hang)))
            return hang
        silent_s = heard.silent_s()[0]
        if silent_s <= self.hang_timeout_s:
            return None
        return Hang((0,), f"rank 0 on {os.environ['MASTER_ADDR']} has given rank {self.ranks.rank} no sign of life for "
                          f"{silent_s:.0f} s: it is stopped, or its machine cannot be reached")

    def _beat(self) -> Beat:
        count, phase, step, since, samples = self._now
        still_s = time.monotonic() - max(since, self._floor)
        late = still_s > self.hang_timeout_s / 2
        stack = _stack_of(self._main) if late else ""
        names = self._names(samples) if late else ()
        return Beat(self.ranks.rank, socket.gethostname(), count, phase, step, still_s, names, stack)

    def _names(self, samples: Sequence[int | str]) -> tuple[str, ...]:
        """Ids of records. Reading one may hang as the rank does, so another thread does it, and not for long."""
        found: list[str] = []

        def read() -> None:
            found.extend(sample if isinstance(sample, str) else self.name_sample(sample) for sample in samples)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(timeout=min(2.0, self.hang_timeout_s / 10))
        named = tuple(found)
        return named + tuple(str(sample) for sample in samples[len(named):])

    def _end_when_left_alone(self) -> None:
        """Ends this rank when it was told to but waits for ever, as after the death of another one."""
        asked, since = self.notice.terminated_at, max(self._now[3], self._floor)
        if asked is None or is_saving(self._now[1]):  # that takes what it takes, and hang_timeout_s watches it
            return
        patience = max(_TERM_GRACE_S, 2 * self._longest_s)
        if time.monotonic() - max(asked, since) > patience:
            self._leave((), f"rank {self.ranks.rank} was told to end and waited {patience:.0f} s for the others: "
                            f"step {self._now[2]}, {self._now[1]}")

    def _end(self, hang: Hang) -> None:
        if self.ranks.is_main:
            time.sleep(2 * min(5.0, self.hang_timeout_s / 10))  # the others read the verdict from this process
        self._leave(hang.ranks, hang.message)

    def _leave(self, hung: Sequence[int], message: str) -> None:
        if self.ranks.is_main or self.ranks.rank in hung:
            print(f"\nHang: {message}", file=sys.stderr, flush=True)
        self.on_end(hung, message, max(0, self._now[2] - 1))
        self.exit(EXIT_HUNG)


@dataclass(frozen=True)
class UnwatchedGuard:
    """In the place of a watchdog where nothing is watched."""

    notice: StopNotice

    def enter(self, phase: str, step: int, samples: Sequence[int | str] = ()) -> None:
        """Nobody reads it."""

    def wants_stop(self) -> bool:
        """Whether this rank was asked to end."""
        return self.notice.asked()

    def stop(self) -> None:
        """There is nothing to end."""


class _Heard:
    """The last beats of the first ranks, and when each came, by this machine's clock."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._raw: list[bytes] = [b""] * num_ranks
        self._at = [time.monotonic()] * num_ranks

    def note(self, raw: Sequence[bytes]) -> None:
        """What the store holds now. Every beat differs from the one before, as its time goes on."""
        now = time.monotonic()
        for rank, beat in enumerate(raw):
            if beat != self._raw[rank]:
                self._raw[rank], self._at[rank] = beat, now

    def forgive(self) -> None:
        """Every rank is taken for heard of now."""
        self._at = [time.monotonic()] * self.num_ranks

    def beats(self) -> list[Beat]:
        """One a rank; a rank that has not said anything stands at the beginning."""
        return [
            Beat(**{**said, "samples": tuple(said["samples"])}) if raw and (said := json.loads(raw))
            else Beat(rank, "an unknown host", 0, "before its first beat", 0, 0.0)
            for rank, raw in enumerate(self._raw)
        ]

    def silent_s(self) -> dict[int, float]:
        """Seconds since each rank's last beat."""
        now = time.monotonic()
        return {rank: now - at for rank, at in enumerate(self._at)}


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _stack_of(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)[-_INNERMOST:]) if frame else ""
