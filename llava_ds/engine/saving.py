"""Checkpoints of a run: every rank writes its own stretches while training goes on; the file written last commits them.

A save blocks training while the rank's tensors are copied in host memory. A thread writes the files. When all ranks are
done, which they tell each other with the numbers of a later step, rank 0 commits. Nothing is gathered.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llava_ds.checkpoint.fragments import STEP_FILE, STEPS_KEY, Fragment, shard_names, shard_tensors
from llava_ds.checkpoint.layout import (
    FileRecord,
    commit,
    list_steps,
    reading,
    remove_folder,
    step_dir,
    step_number,
)
from llava_ds.checkpoint.writer import write_safetensors
from llava_ds.distributed import Ranks, gather_objects
from llava_ds.durable import sync_to_disk
from llava_ds.engine.deepspeed_backend import full_shape, trained_parameters
from llava_ds.engine.optimizer_state import Place, find_misplaced, live_fragments, optimizer_steps, own_places
from llava_ds.engine.training_state import Progress, describe_state
from llava_ds.errors import CheckpointError, ConfigError, DataError

_ADAMW_BYTES = 12  # of an element: weight and two moments in fp32
_SPARE_BYTES = 16 << 20  # for the small files of a checkpoint, and what else writes to the disk meanwhile


@dataclass(frozen=True)
class SavePolicy:
    """Which checkpoints stay (docs/checkpoints.md), and whether training goes on while one is written."""

    keep_last: int
    keep_every: int | None = None
    in_background: bool = True


@dataclass
class _Writing:
    """A checkpoint that this rank is writing."""

    progress: Progress
    folder: Path
    state: Mapping[str, Any]
    started: float
    blocked_s: float = 0.0
    thread: threading.Thread | None = None
    failure: str | None = None
    finished: bool = False


@dataclass
class Saver:
    """Saves the steps of a run. All ranks call the same methods in the same order.

    ``run_record`` is the text of run.json, a copy of which goes into every checkpoint; ``facts`` go into step.json.
    ``on_first_commit`` is called on rank 0 with the first folder that is committed; what it raises ends the run on all
    ranks.
    """

    engine: Any
    run_dir: Path
    ranks: Ranks
    policy: SavePolicy
    run_record: str = "{}"
    facts: Mapping[str, Any] = field(default_factory=dict)
    on_first_commit: Callable[[Path], None] | None = None
    check_owner: Callable[[], None] = lambda: None
    """Raises CheckpointError on rank 0 when the run folder is no longer this run's to write."""
    committed: int | None = None
    """The last step that is committed, where it is known."""
    log: Callable[[str], None] = print
    _writing: _Writing | None = None
    _failure: str | None = None
    """Of rank 0's part in a save."""
    _complaint: str | None = None
    """Of something else, for which the run ends."""
    _places: list[Place] = field(init=False)
    _buffers: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError on every rank when DeepSpeed keeps the optimizer in a way that cannot be saved."""
        self._places = own_places(self.engine, self.ranks)
        misplaced = gather_objects(self.ranks, find_misplaced(self.engine, self._places))
        if any(misplaced):
            rank = next(rank for rank, names in enumerate(misplaced) if names)
            raise ConfigError(
                f"rank {rank}: the optimizer's fp32 weights of {', '.join(misplaced[rank][:5])} are not those that the "
                "model computes with, so nothing could be saved rightly.\n  Take one of ds_configs/, or leave out the "
                "keys of the DeepSpeed JSON that these do not have."
            )

    def start(self, progress: Progress) -> None:
        """Begins to save a step and returns when training may go on. A save that still runs is waited for.

        Raises CheckpointError on every rank when there is no room for it, or the one before failed.
        """
        begin = time.perf_counter()
        self.finish()
        folder = step_dir(self.run_dir, progress.step)
        if self.ranks.is_main:
            self._note_failure(lambda: self._make_room(folder, progress.step))
        self._raise_on_all(self._failure)  # also lets no rank write before the folder is there
        fragments = live_fragments(self.engine, self._places)
        if self.policy.in_background:
            fragments = self._copy(fragments)
        writing = _Writing(replace(progress), folder, describe_state(self.engine, progress), begin)
        steps = optimizer_steps(self.engine, self._places)
        self._writing = writing
        writing.thread = threading.Thread(target=self._write, args=(writing, fragments, steps), daemon=True)
        writing.thread.start()
        if not self.policy.in_background:
            writing.thread.join()
        writing.blocked_s = time.perf_counter() - begin

    def votes(self) -> tuple[int, int]:
        """(1, 0) when this rank has written its files, (0, 1) when something failed, else (0, 0): to be summed up."""
        writing = self._writing
        if self._failure or self._complaint or (writing and writing.failure):
            return 0, 1
        return (1, 0) if writing and writing.finished else (0, 0)

    def fail(self, message: str) -> None:
        """Something else of the run could not be written: all ranks save and end when they next agree."""
        self._complaint = message

    def settle(self, num_done: int, num_failed: int, progress: Progress) -> None:
        """Commits when all ranks are done. When one failed, saves what can be saved (``progress``) and raises
        CheckpointError on every rank."""
        if num_failed:
            self.save_now(progress)
        elif self._writing and num_done == self.ranks.world_size:
            self._commit(self._writing)

    def finish(self) -> None:
        """Waits until the save that runs is committed. Raises CheckpointError on every rank when that failed."""
        if self._writing and self._writing.thread:
            self._writing.thread.join()
            failures = gather_objects(self.ranks, self._writing.failure)
            if any(failures):
                self._raise(failures)
            self._commit(self._writing)
        self._raise_on_all(self._failure)

    def save_now(self, progress: Progress) -> None:
        """Saves a step, unless it is saved, and returns when it is committed.

        Raises CheckpointError on every rank when that failed, or ``fail`` was called on one: then after saving.
        """
        self.finish()
        if self.committed != progress.step:
            self.start(progress)
            self.finish()
        self._raise_on_all(self._complaint)

    def _make_room(self, folder: Path, step: int) -> None:
        self.check_owner()
        if folder.exists():
            remove_folder(folder)  # what an earlier process left unfinished
        folder.mkdir(parents=True)
        numel = sum(torch.Size(shape).numel() for shape in self._shapes().values())
        # The first save asks for two: an older checkpoint goes after a newer one is committed.
        needed = numel * _ADAMW_BYTES * (1 if step else 2) + _SPARE_BYTES
        free = shutil.disk_usage(folder).free
        if free < needed:
            folder.rmdir()
            raise CheckpointError(
                f"step {step} cannot be saved: {self.run_dir} has {free / 1e9:.3f} GB free, and "
                f"{needed / 1e9:.3f} GB are needed ({numel:,} trained parameters, {_ADAMW_BYTES} bytes each"
                f"{'' if step else ', for two checkpoints'}).\n  Make room, or choose another --run-dir."
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: full_shape(parameter) for name, parameter in trained_parameters(self.engine.module)}

    def _copy(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments as they are now, in host memory that is kept for the next save."""
        copies = [
            Fragment(
                fragment.parameter,
                fragment.start,
                self._copy_into(number, "", fragment.weight),
                {name: self._copy_into(number, name, value) for name, value in fragment.states.items()},
            )
            for number, fragment in enumerate(fragments)
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copy_into(self, number: int, name: str, value: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get((number, name))
        if buffer is None:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[number, name] = buffer
        return buffer.copy_(value, non_blocking=True)

    def _write(self, writing: _Writing, fragments: Sequence[Fragment], steps: Mapping[str, int]) -> None:
        try:
            weights, states = shard_tensors(fragments)
            weights_name, states_name = shard_names(self.ranks.rank, self.ranks.world_size)
            metadata = {STEPS_KEY: json.dumps(steps)}
            records = {
                weights_name: asdict(write_safetensors(writing.folder / weights_name, weights)),
                states_name: asdict(write_safetensors(writing.folder / states_name, states, metadata=metadata)),
            }
            note = self._note(writing, self.ranks.rank)
            note.write_text(json.dumps(records))
        except Exception as error:  # of a thread it would be lost
            writing.failure = _describe(error)
        finally:
            writing.finished = True

    def _note(self, writing: _Writing, rank: int) -> Path:
        """Says what a rank wrote; gone when the checkpoint is committed."""
        return writing.folder / f"written-{rank:05d}.json"

    def _commit(self, writing: _Writing) -> None:
        self._writing = None
        if self.ranks.is_main:
            self._note_failure(lambda: self._commit_on_main(writing))
        self.committed = writing.progress.step

    def _commit_on_main(self, writing: _Writing) -> None:
        self.check_owner()
        records = self._collect_notes(writing)
        num_bytes = sum(record.size for record in records.values())
        seconds = time.perf_counter() - writing.started
        saved = {"bytes": num_bytes, "seconds": round(seconds, 3), "blocked_s": round(writing.blocked_s, 3)}
        state = {
            **self.facts, "world_size": self.ranks.world_size, **writing.state,
            "parameters": self._shapes(), "saved": saved,
        }
        (writing.folder / STEP_FILE).write_text(json.dumps(state, indent=1) + "\n")
        (writing.folder / "run.json").write_text(self.run_record)
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.is_file():
            sync_to_disk(metrics)  # a committed step has its line in it
        commit(writing.folder, records)
        self._prune(writing.progress.step)
        callback, self.on_first_commit = self.on_first_commit, None
        if callback:
            callback(writing.folder)

    def _collect_notes(self, writing: _Writing) -> dict[str, FileRecord]:
        records: dict[str, FileRecord] = {}
        for rank in range(self.ranks.world_size):
            note = self._note(writing, rank)
            if not note.is_file():
                raise CheckpointError(
                    f"rank {rank} has written its part of {writing.folder}, but rank 0 does not see it.\n"
                    "  Choose a --run-dir on a file system that all machines share."
                )
            with reading(note):
                raw = json.loads(note.read_text())
            records |= {name: FileRecord(**record) for name, record in raw.items()}
            note.unlink()
        return records

    def _prune(self, last: int) -> None:
        steps = [folder for folder in list_steps(self.run_dir) if step_number(folder) <= last]
        for folder in steps[: -self.policy.keep_last]:
            every = self.policy.keep_every
            if every and step_number(folder) and step_number(folder) % every == 0:
                continue
            try:
                remove_folder(folder)
            except OSError as error:  # a checkpoint too many is no reason to stop
                self.log(f"{folder} cannot be removed: {error}")

    def _note_failure(self, work: Callable[[], None]) -> None:
        """Keeps what went wrong until all ranks can hear of it."""
        try:
            work()
        except Exception as error:  # of rank 0 alone, while the others go on
            self._failure = _describe(error)

    def _raise_on_all(self, failure: str | None) -> None:
        failures = gather_objects(self.ranks, failure)
        if any(failures):
            self._raise(failures)

    def _raise(self, failures: Sequence[str | None]) -> None:
        writing, self._writing, self._failure, self._complaint = self._writing, None, None, None
        if writing and self.ranks.is_main:
            shutil.rmtree(writing.folder, ignore_errors=True)
        rank = next(rank for rank, failure in enumerate(failures) if failure)
        where = f"rank {rank}: " if self.ranks.world_size > 1 else ""
        steps = list_steps(self.run_dir)
        last = f"Step {step_number(steps[-1])} is the last that is saved" if steps else "No step is saved"
        raise CheckpointError(f"{where}{failures[rank]}\n  {last}; start again with --resume.", on_every_rank=True)


def _describe(error: Exception) -> str:
    """An error of ours by its message, any other with its type."""
    ours = isinstance(error, CheckpointError | ConfigError | DataError)
    return str(error) if ours else f"{type(error).__name__}: {error}"
