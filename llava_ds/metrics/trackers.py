"""Where the numbers of a step go: a progress bar, metrics.jsonl, and on request TensorBoard or Weights & Biases."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from llava_ds.errors import BackendUnavailableError, DataError


class _Lines:
    """A file that gets every state of a bar as a line of its own, in the place of one line that is written over."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Writes a line, unless there is nothing in it."""
        line = text.strip()
        return self._file.write(f"{line}\n") if line else 0

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()


class ProgressBar:
    """One line on the terminal; one line every few seconds where the output is a file."""

    def __init__(self, num_steps: int, title: str, num_done: int = 0) -> None:
        self.bar = tqdm(
            total=num_steps,
            initial=num_done,
            desc=title,
            file=sys.stdout if sys.stdout.isatty() else _Lines(sys.stdout),
            mininterval=0.5 if sys.stdout.isatty() else 10.0,
            dynamic_ncols=sys.stdout.isatty(),
        )

    def log(self, record: dict[str, Any]) -> None:
        """Shows loss, rate, speed and the share of time spent waiting for data, and an evaluation as a line."""
        if "eval_loss" in record:
            self._print_evaluation(record)
        if "loss" not in record:
            return
        self.bar.set_postfix_str(
            f"loss {record['loss']:.4f} lr {record['lr']:.1e} {record['samples_per_s']:.0f} samples/s "
            f"{record['tokens_per_s']:.0f} tok/s data {record['data_wait_frac']:.0%}",
            refresh=False,
        )
        self.bar.update(1)

    def _print_evaluation(self, record: dict[str, Any]) -> None:
        names = ("loss", "token_accuracy", "teacher_forced_exact")
        numbers = {name: record[f"eval_{name}"] for name in names}
        text = " ".join(f"{name} {'none' if value is None else f'{value:.4f}'}" for name, value in numbers.items())
        samples = f"{record['eval_num_samples']} samples in {record['eval_s']:.1f} s"
        self.bar.write(f"evaluation after step {record['step']}: {text} ({samples})", file=sys.stdout)

    def close(self) -> None:
        """Leaves the last line."""
        self.bar.close()


class JsonlTracker:
    """One JSON object a step in ``metrics.jsonl``; that of step 0 holds the evaluation before training.

    A run that goes on after ``num_done`` steps keeps their lines and drops later ones: no step stands twice. Lines that
    are missing are named.
    """

    def __init__(self, path: Path, num_done: int = 0) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= num_done] if num_done else []
        missing = sorted(set(range(1, num_done + 1)) - {record["step"] for record in kept})
        if missing:
            print(f"{path} has no lines of {len(missing)} step(s) that are done, {missing[0]} to {missing[-1]}")
        partial = path.with_name(f".{path.name}")
        with partial.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        self.file = path.open("a")
        self.started = time.time() - (kept[-1]["elapsed_s"] if kept else 0.0)

    def log(self, record: dict[str, Any]) -> None:
        """Writes and flushes one line."""
        self.file.write(json.dumps({**record, "elapsed_s": round(time.time() - self.started, 3)}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class TensorBoardTracker:
    """Event files in ``run_dir/tensorboard``."""

    def __init__(self, run_dir: Path, title: str, num_done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written of later steps is not shown any more.
        purge_step = num_done + 1 if num_done else None
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, record: dict[str, Any]) -> None:
        """Writes every number of a step; a number that is not known (None) is left out."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Writes what is buffered."""
        self.writer.close()


class WandbTracker:
    """A run of Weights & Biases; project, account and mode come from its own ``WANDB_*`` variables.

    A run that goes on writes to the same one; it leaves out steps that it was told before.
    """

    def __init__(self, run_dir: Path, title: str, num_done: int = 0) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        known = id_file.read_text() if num_done and id_file.is_file() else None
        self.run = wandb.init(name=title, dir=str(run_dir), id=known, resume="allow" if known else None)
        id_file.write_text(self.run.id)

    def log(self, record: dict[str, Any]) -> None:
        """Sends a step's numbers."""
        self.run.log(record, step=record["step"])

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


EXTRA_TRACKERS: dict[str, Callable[[Path, str, int], Any]] = {
    "tensorboard": TensorBoardTracker, "wandb": WandbTracker,
}
"""By the name of the package that each needs; of run folder, title and number of steps that are done."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises BackendUnavailableError when the package of a tracker is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"track={list(names)}: {', '.join(missing)} is not installed.\n"
            "  Install the extra llava_ds[track], or take it out of the recipe."
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none where there is no file. A last line that was cut off is left out.

    Raises DataError for a line that is not JSON.
    """
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}\n  Take the line out, or move the file.") from error
    return records
