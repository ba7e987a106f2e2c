"""The columns of ScienceQA's table: which problems are in each, and the accuracies that were published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.data.sources.scienceqa import read_choices, read_split, read_text
from llava_ds.errors import DataError

_SUBJECTS = ("natural science", "social science", "language science")
_GRADES = tuple(f"grade{number}" for number in range(1, 13))

COLUMNS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "NAT": lambda problem: problem["subject"] == _SUBJECTS[0],
    "SOC": lambda problem: problem["subject"] == _SUBJECTS[1],
    "LAN": lambda problem: problem["subject"] == _SUBJECTS[2],
    "TXT": lambda problem: bool(problem["hint"]),
    "IMG": lambda problem: bool(problem.get("image")),
    "NO": lambda problem: not problem["hint"] and not problem.get("image"),
    "G1-6": lambda problem: problem["grade"] in _GRADES[:6],
    "G7-12": lambda problem: problem["grade"] in _GRADES[6:],
}
"""Subject; text, image or no context (a problem may have both text and image); grade.

As ``tools/evaluate_acc.py`` of the ScienceQA repository has them.
"""

PAPER_ROWS = {
    "GPT-3.5 w/ CoT": (75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68, 75.17),
    "MM-CoT Large": (95.91, 82.00, 90.82, 95.26, 88.80, 92.89, 92.44, 90.31, 91.68),
    "GPT-4 (text only)": (84.06, 73.45, 87.36, 81.87, 70.75, 90.73, 84.69, 79.10, 82.69),
    "LLaVA": (90.36, 95.95, 88.00, 89.49, 88.00, 90.66, 90.93, 90.90, 90.92),
    "LLaVA + GPT-4 (complement)": (90.36, 95.50, 88.55, 89.05, 87.80, 91.08, 92.22, 88.73, 90.97),
    "LLaVA + GPT-4 (judge)": (91.56, 96.74, 91.09, 90.62, 88.99, 93.52, 92.73, 92.16, 92.53),
}
"""Percent by ``COLUMNS``, then the average over problems: Table 7 of Visual Instruction Tuning (arXiv 2304.08485)."""


@dataclass(frozen=True)
class Problem:
    """``answer`` is the index of the right choice; ``columns`` are those of ``COLUMNS`` that the problem counts in."""

    choices: Sequence[str]
    answer: int
    columns: frozenset[str]


def read_problems(problems_file: Path, splits_file: Path, split: str) -> tuple[dict[str, Problem], dict[str, Any]]:
    """The problems of a split by id, in its order; and their records as they stand in the file.

    Raises ConfigError for an unknown split, DataError for a broken file, or that counts the problems that are wrong.
    """
    records = read_split(problems_file, splits_file, split)
    problems, wrong = {}, []
    for pid, record in records.items():
        try:
            problems[pid] = _parse(record, f"{problems_file}[{pid!r}]")
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(
            f"{len(wrong)} problem(s) of split {split!r} cannot be scored, the first:\n  " + "\n  ".join(wrong[:5])
        )
    return problems, records


def _parse(record: Any, origin: str) -> Problem:
    choices, answer = read_choices(record, origin)
    read_text(record, "hint", origin)
    for key, known in (("subject", _SUBJECTS), ("grade", _GRADES)):
        if read_text(record, key, origin) not in known:
            raise DataError(f"{origin}: {key!r} is {record[key]!r:.80}; ScienceQA has {', '.join(known)}")
    return Problem(choices, answer, frozenset(name for name, belongs in COLUMNS.items() if belongs(record)))


def format_table(rows: Mapping[str, Sequence[float | None]]) -> list[str]:
    """Rows of percentages as the paper prints them, a head first; None, where a column has no problems, is a dash."""
    width = max(map(len, rows))
    lines = ["".ljust(width) + "".join(name.rjust(7) for name in (*COLUMNS, "Avg"))]
    for name, values in rows.items():
        lines.append(name.ljust(width) + "".join(("-" if v is None else f"{v:.2f}").rjust(7) for v in values))
    return lines
