"""Where the numbers of a step go: a progress bar and metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class ProgressBar:
    """One line on the terminal; one line every few seconds where the output is a file."""

    def __init__(self, num_steps: int, title: str) -> None:
        self.bar = tqdm(
            total=num_steps,
            desc=title,
            file=sys.stdout,
            mininterval=0.5 if sys.stdout.isatty() else 10.0,
            dynamic_ncols=sys.stdout.isatty(),
        )

    def log(self, record: dict[str, Any]) -> None:
        """Shows loss, rate, speed and the share of time spent waiting for data."""
        self.bar.set_postfix_str(
            f"loss {record['loss']:.4f} lr {record['lr']:.1e} {record['samples_per_s']:.0f} samples/s "
            f"{record['tokens_per_s']:.0f} tok/s data {record['data_wait_frac']:.0%}",
            refresh=False,
        )
        self.bar.update(1)

    def close(self) -> None:
        """Leaves the last line."""
        self.bar.close()


class JsonlTracker:
    """One JSON object a step in ``metrics.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.started = time.time()

    def log(self, record: dict[str, Any]) -> None:
        """Writes and flushes one line."""
        self.file.write(json.dumps({**record, "elapsed_s": round(time.time() - self.started, 3)}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
