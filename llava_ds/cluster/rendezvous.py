"""Where the processes of a preflight meet: each puts what it found, rank 0 decides, nobody waits for ever.

A ``TCPStore`` and no collective: a node that never comes, or dies, keeps no other from hearing what was decided.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, TCPStore

from llava_ds.distributed import Ranks, flush_and_exit

_POLL_S = 0.1
SILENCE_S = 20.0
"""Without an answer from rank 0's store for so long, a process ends by itself."""
_BEAT_S = 0.2
_SILENT_S = 3.0
_HURRY_S = 5.0
BAD_NODES_CODE = 3
"""Exit code of a preflight that names nodes."""


class Rendezvous:
    """The store of rank 0, as one process sees it.

    Raises torch.distributed.DistError on every call when rank 0 is gone.
    """

    def __init__(self, ranks: Ranks, address: str, port: int, wait_s: float) -> None:
        """Opens the store on rank 0, or connects to it for ``wait_s`` at most. Port 0 is any (for one rank)."""
        self.ranks, self.address = ranks, address
        self._watch = _Watch(wait_s + SILENCE_S)
        self._store = TCPStore(
            address, port, None, ranks.is_main, timedelta(seconds=wait_s), wait_for_workers=False
        )
        self._watch.extend()

    def connect_again(self, wait_s: float) -> TCPStore:
        """Another connection to the same store: what waits there keeps nothing here from going on."""
        return TCPStore(self.address, self._store.port, None, False, timedelta(seconds=wait_s), wait_for_workers=False)

    def put(self, topic: str, value: Any) -> None:
        """Leaves plain data of this rank."""
        self._store.set(f"{topic}/{self.ranks.rank}", json.dumps(value))

    def gather(
        self, topic: str, wait_s: float, hurry: Callable[[Any], bool] = lambda value: False
    ) -> list[Any | None]:
        """[world_size] what the ranks put; None of those that put nothing within ``wait_s``.

        As soon as ``hurry`` is true of a value, the others have no more than 5 s.
        """
        deadline, hurried = time.monotonic() + wait_s, False
        values: list[Any | None] = [None] * self.ranks.world_size
        while True:
            for rank in (rank for rank, value in enumerate(values) if value is None):
                values[rank] = self._read(f"{topic}/{rank}")
            self._watch.extend()
            if all(value is not None for value in values) or time.monotonic() > deadline:
                return values
            if not hurried and any(value is not None and hurry(value) for value in values):
                deadline, hurried = min(deadline, time.monotonic() + _HURRY_S), True
            time.sleep(_POLL_S)

    def decide(self, topic: str, value: Any) -> None:
        """Tells all ranks; for rank 0."""
        self._store.set(topic, json.dumps(value))

    def decision(self, topic: str, wait_s: float) -> Any:
        """What rank 0 decided, as soon as it did. Raises DistError when it is long over the ``wait_s`` that it has."""
        deadline = time.monotonic() + wait_s + SILENCE_S
        while time.monotonic() < deadline:
            value = self._read(topic)
            self._store.add(f"beat/{self.ranks.rank}", 1)
            self._watch.extend()
            if value is not None:
                return value
            time.sleep(_BEAT_S)
        raise DistStoreError(f"rank 0 has not decided on {topic!r} within {wait_s + SILENCE_S:g} s; it hangs")

    def find_silent(self) -> list[int]:
        """The ranks that wait for a decision, but do not ask for it any more; for rank 0. Takes some seconds."""
        others = range(1, self.ranks.world_size)
        before = [self._store.add(f"beat/{rank}", 0) for rank in others]
        time.sleep(_SILENT_S)
        return [rank for rank, beats in zip(others, before, strict=True) if self._store.add(f"beat/{rank}", 0) == beats]

    def _read(self, key: str) -> Any | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


class _Watch:
    """Ends this process when nobody extends its time: a machine that lost its power closes no connection."""

    def __init__(self, seconds: float) -> None:
        self.extend(seconds)
        threading.Thread(target=self._run, daemon=True).start()

    def extend(self, seconds: float = SILENCE_S) -> None:
        """Gives it so many seconds from now."""
        self._deadline = time.monotonic() + seconds

    def _run(self) -> None:
        while time.monotonic() < self._deadline:
            time.sleep(_POLL_S)
        print("preflight: rank 0 does not answer; its machine or the network to it is gone", file=sys.stderr)
        flush_and_exit(BAD_NODES_CODE)
