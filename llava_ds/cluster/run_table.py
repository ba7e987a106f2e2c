"""The overview of runs as text: a line each, columns as wide as they must be."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from llava_ds.cluster.overview import RunLine
from llava_ds.cluster.run_files import METRICS_FILE

_MIN_ERROR_WIDTH = 24
_ALWAYS = ("RUN", "STATE", "STEP")
_RIGHT = ("STEP", "LOSS", "SAMPLES/S", "LEFT", "RESTARTS")


def format_table(lines: Sequence[RunLine], width: int | None = None) -> list[str]:
    """The rows, a head first. Columns without an entry are left out; the last is shortened to fit ``width`` letters."""
    heads = list(_COLUMNS)
    rows = [heads, *([cell(line) for cell in _COLUMNS.values()] for line in lines)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    columns = [column for column in columns if column[0] in _ALWAYS or set(column[1:]) - {"-"}]
    widths = [max(map(text_width, column)) for column in columns]
    if width is not None and columns[-1][0] == "LAST ERROR":
        room = max(_MIN_ERROR_WIDTH, width - sum(widths[:-1]) - 2 * len(widths[:-1]))
        columns[-1] = [shorten(text, room) for text in columns[-1]]
    padded = [
        [_pad(text, size, column[0] in _RIGHT) for text in column]
        for column, size in zip(columns, widths, strict=True)
    ]
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def format_duration(seconds: float) -> str:
    """Like ``45s``, ``12m05s``, ``3h20m`` or ``2d04h``."""
    whole = int(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def shorten(text: str, width: int) -> str:
    """Text that takes at most ``width`` columns of a terminal; what is cut off is marked by dots."""
    if text_width(text) <= width:
        return text
    ends = accumulate(map(text_width, text))
    return f"{text[:bisect_right(list(ends), width - 3)].rstrip()}..."[:width]


def text_width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide letter, none for an accent."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - text_width(text))
    return space + text if right else text + space


def _known(line: RunLine, value: float | None, show: Callable[[float], str]) -> str:
    """A number of metrics.jsonl."""
    if value is None:
        return "?" if METRICS_FILE in line.broken else "-"
    return show(value)


def _steps(line: RunLine) -> str:
    step = _known(line, line.step, lambda value: str(int(value)))
    total = str(line.num_steps) if line.num_steps is not None else "?" if "run.json" in line.broken else "-"
    return "-" if (step, total) == ("-", "-") else f"{step}/{total}"


def _quiet(line: RunLine) -> str:
    if line.quiet_s is None:
        return "-"
    return f"{format_duration(line.quiet_s)}{' (silent)' if line.silent else ''}"


def _error(line: RunLine) -> str:
    """The last error, or else the files that cannot be read."""
    if line.error:
        return line.error
    return f"cannot be read: {', '.join(line.broken)}" if line.broken else "-"


_COLUMNS: dict[str, Callable[[RunLine], str]] = {
    "RUN": lambda line: line.name,
    "STATE": lambda line: line.state,
    "STEP": _steps,
    "LOSS": lambda line: _known(line, line.loss, "{:.4f}".format),
    "SAMPLES/S": lambda line: _known(line, line.samples_per_s, lambda rate: f"{rate:.{1 if rate >= 10 else 2}f}"),
    "LEFT": lambda line: "-" if line.left_s is None else format_duration(line.left_s),
    "LAST LINE": _quiet,
    "RESTARTS": lambda line: str(line.restarts) if line.restarts else "-",
    "JOB": lambda line: line.job or "-",
    "SLURM": lambda line: line.slurm or "-",
    "LAST ERROR": _error,
}
