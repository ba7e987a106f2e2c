"""A few ScienceQA problems whose every number is known."""

import json
from pathlib import Path

SUBJECTS = ("natural science", "social science", "language science")


def problem(answer: int, subject: int = 0, hint: str = "", image: str | None = None, grade: int = 1) -> dict:
    """A problem in the form of problems.json, with three choices."""
    return {
        "question": "Which is heavier?", "choices": ["a feather", "a stone", "water"], "answer": answer, "hint": hint,
        "image": image, "task": "closed choice", "grade": f"grade{grade}", "subject": SUBJECTS[subject],
        "topic": "physics", "category": "Materials", "skill": "Compare", "lecture": "Mass is matter.",
        "solution": "Stones are dense.", "split": "test",
    }  # fmt: skip


PROBLEMS = {
    "1": problem(0, 0, "Look.", None, 1),
    "2": problem(1, 0, "Look.", "image.png", 6),
    "3": problem(2, 1, "", "image.png", 7),
    "4": problem(0, 1, "", None, 12),
    "5": problem(1, 2, "", None, 2),
    "6": problem(2, 2, "", "image.png", 8),
}
SHOTS = {"90": problem(0, image="image.png"), "91": problem(1) | {"solution": ""}, "92": problem(2), "93": problem(1)}


def write_scienceqa(folder: Path) -> list[str]:
    """The options of ``tools/score`` for the problems, written to ``folder``: ``PROBLEMS`` are the test split."""
    (folder / "problems.json").write_text(json.dumps(PROBLEMS | SHOTS))
    (folder / "pid_splits.json").write_text(json.dumps({"train": [*SHOTS], "test": [*PROBLEMS]}))
    return ["--problems", str(folder / "problems.json"), "--splits", str(folder / "pid_splits.json")]


def write_predictions(file: Path, texts: dict[str, str], key: str = "id", **more: str) -> Path:
    """Texts by id as JSONL."""
    file.write_text("".join(json.dumps({key: pid, "text": text, **more}) + "\n" for pid, text in texts.items()))
    return file
