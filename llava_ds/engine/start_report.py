"""What this rank leaves about its end, in the folder of the start (see starts.py)."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava_ds.distributed import PeerFailedError, Ranks, run_on_main
from llava_ds.starts import (
    HANG,
    START_VARIABLE,
    End,
    Failure,
    begin_start,
    conclude_earlier,
    note_failure,
    slurm_facts,
    write_end,
)

_PEER_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|NCCL|gloo|store.*(time|connect)", re.IGNORECASE
)


class StartReport:
    """Notes why this rank ended. What cannot be written is printed instead: it ends a rank that ends already."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        given = environ.get(START_VARIABLE)
        self.folder = Path(given).absolute() if given else None
        """Of this start; None until ``open`` where no batch script made it."""
        self.step = 0
        """Steps that are done."""

    def open(self, run_dir: Path, ranks: Ranks) -> None:
        """Makes the folder of the start where there is none yet. Collective."""
        if self.folder is None:
            facts = {"num_ranks": ranks.world_size, **slurm_facts(self._environ)}
            self.folder = run_on_main(ranks, lambda: begin_start(run_dir.absolute(), facts))
        if ranks.is_main:  # it holds the run's lock
            self._write(conclude_earlier)

    def failed(self, ranks: Ranks, error: Exception) -> None:
        """This rank ends because of ``error``."""
        text = str(error) or repr(error)
        of_peer = isinstance(error, PeerFailedError) or (
            isinstance(error, RuntimeError | ConnectionError) and bool(_PEER_GONE.search(text))
        )
        self._note(Failure(ranks.rank, type(error).__name__, text, self.step, of_peer))

    def hung(self, ranks: Ranks, hung: Sequence[int], message: str, step: int) -> None:
        """This rank ends because ranks hang, or (none named) because it waited too long for the others."""
        speaks = ranks.rank in hung or (ranks.is_main and bool(hung))
        self._note(Failure(ranks.rank, HANG, message, step, of_peer=not speaks))

    def ended(self, ranks: Ranks, end: End) -> None:
        """All ranks ended as ``end`` says (rank 0 writes it)."""
        if ranks.is_main and self.folder:
            self._write(lambda folder: write_end(folder, end))

    def _note(self, failure: Failure) -> None:
        self._write(lambda folder: note_failure(folder, failure))

    def _write(self, write: Callable[[Path], None]) -> None:
        if self.folder is None:
            return
        try:
            write(self.folder)
        except OSError as error:
            print(f"{time.strftime('%X')} {socket.gethostname()}: {self.folder} cannot be written: {error}")
