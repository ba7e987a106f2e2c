"""ScienceQA in its original layout: ``problems.json``, ``pid_splits.json`` and a folder of images.

A prompt format ``INPUT-OUTPUT`` says in which order the parts of a problem stand: Q question, C context, M options,
L lecture, E explanation (the ``solution`` field), A answer. The paper's is QCM-LEA.

The texts are those of the ScienceQA repository and of LLaVA's converter, but for four slips of theirs: in AL and AE
they swap lecture and explanation; they cut "Question: " and "BECAUSE:" out of the middle of a text, too; and they
leave a space before the answer of a problem that has neither lecture nor explanation.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ds.constants import IMAGE_PLACEHOLDER
from llava_ds.data.sources.llava_json import check_unicode
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Sample, Turn

_QCM = "Question: {question}\nContext: {context}\nOptions: {options}\n"
_QC, _M = "Question: {question}\nContext: {context}\n", "Options: {options}\n"

INPUT_FORMATS = {
    "CQM": "Context: {context}\nQuestion: {question}\n" + _M,
    "QCM": _QCM,
    "QCML": _QCM + "BECAUSE: {lecture}\n",
    "QCME": _QCM + "BECAUSE: {solution}\n",
    "QCMLE": _QCM + "BECAUSE: {lecture} {solution}\n",
    "QCLM": _QC + "BECAUSE: {lecture}\n" + _M,
    "QCEM": _QC + "BECAUSE: {solution}\n" + _M,
    "QCLEM": _QC + "BECAUSE: {lecture} {solution}\n" + _M,
}
"""What the question says. Those with L or E tell the reader why: upper bounds, not fair tests."""

OUTPUT_FORMATS = {
    "A": "The answer is {answer}.",
    "AL": "The answer is {answer}. BECAUSE: {lecture}",
    "AE": "The answer is {answer}. BECAUSE: {solution}",
    "ALE": "The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "{lecture} The answer is {answer}.",
    "EA": "{solution} The answer is {answer}.",
    "LEA": "{lecture} {solution} The answer is {answer}.",
    "ELA": "{solution} {lecture} The answer is {answer}.",
    "LEPA": "{lecture_line}{solution_line}###\nANSWER: {answer}.",
}
"""What the answer says. LEPA is LLaVA's own: labelled lines, ``###``, and the answer."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Which name the choices in their order."""


def format_problem(problem: Any, prompt_format: str, origin: str) -> tuple[str, str]:
    """The question and the answer of a problem as texts, without the image placeholder.

    Raises ConfigError for an unknown ``prompt_format``, and DataError that begins with ``origin`` for a bad problem.
    """
    input_format, output_format = check_prompt_format(prompt_format)
    parts = _parts(problem, origin)
    question = _tidy(INPUT_FORMATS[input_format].format(**parts)).removeprefix("Question: ")
    return question, _tidy(OUTPUT_FORMATS[output_format].format(**parts))


def check_prompt_format(prompt_format: str) -> tuple[str, str]:
    """The keys into ``INPUT_FORMATS`` and ``OUTPUT_FORMATS``. Raises ConfigError that lists them."""
    input_format, _, output_format = prompt_format.partition("-")
    if input_format not in INPUT_FORMATS or output_format not in OUTPUT_FORMATS:
        raise ConfigError(
            f"unknown ScienceQA prompt format {prompt_format!r}; it is INPUT-OUTPUT, e.g. QCM-LEA, with INPUT one of "
            f"{', '.join(INPUT_FORMATS)} and OUTPUT one of {', '.join(OUTPUT_FORMATS)}"
        )
    return input_format, output_format


@dataclass(frozen=True)
class ScienceQaSource:
    """The problems of one split, in the order of ``pid_splits.json``."""

    name: str
    fingerprint: str
    split: str
    prompt_format: str
    image_root: Path
    pids: tuple[str, ...]
    problems: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pids)

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError that names the problem when it is bad, or when its image is missing."""
        pid = self.pids[index]
        origin = f"problems.json[{pid!r}]"
        if pid not in self.problems:
            raise DataError(
                f"{origin}: no such problem, but split {self.split!r} of pid_splits.json names it; "
                "take both files from one release",
                reason="a split names a problem that is not there",
            )
        problem = self.problems[pid]
        question, answer = format_problem(problem, self.prompt_format, origin)
        images = _images(problem, pid, self.split, self.image_root, origin)
        check_unicode(origin, pid, question, answer, *images)
        turns = (Turn("user", question + f"\n{IMAGE_PLACEHOLDER}" * len(images)), Turn("assistant", answer))
        return Sample(pid, images, turns, origin)


def open_scienceqa(
    path: Path, image_root: Path | None, split: str = "train", prompt_format: str = "QCM-LEA"
) -> ScienceQaSource:
    """The problems of a split (train, val, test, trainval, minival, ...) of the folder ``path``.

    Images lie in ``image_root`` (default ``path/images``) as ``SPLIT/PID/image.png`` or ``PID/image.png``.

    Raises ConfigError for an unknown split or prompt format, DataError for a missing or broken file.
    """
    check_prompt_format(prompt_format)
    root = (image_root or path / "images").absolute()
    digest = hashlib.sha256(f"{split}|{prompt_format}|{root}".encode())
    problems = _read_object(path / "problems.json", digest)
    pids = _read_pids(path / "pid_splits.json", split, digest)
    chosen = {pid: problems[pid] for pid in pids if pid in problems}
    return ScienceQaSource(f"{path.name}[{split}]", digest.hexdigest(), split, prompt_format, root, tuple(pids), chosen)


def read_split(problems_file: Path, splits_file: Path, split: str) -> dict[str, Any]:
    """The problems of a split as they stand in the file, by pid, in the order of the split.

    Raises ConfigError for an unknown split, DataError for a missing or broken file, problems that are not there, or a
    pid that stands twice.
    """
    problems, pids = _read_object(problems_file), _read_pids(splits_file, split)
    repeated = [pid for pid, count in Counter(pids).items() if count > 1]
    if repeated:
        raise DataError(
            f"{splits_file}: {len(repeated)} pid(s) stand more than once in {split!r}: {', '.join(repeated[:5])}; "
            "keep one of each"
        )
    missing = [pid for pid in pids if pid not in problems]
    if missing:
        raise DataError(
            f"{problems_file}: lacks {len(missing)} of the {len(pids)} problems of {split!r} in {splits_file}: "
            f"{', '.join(missing[:5])}; take both files from one release"
        )
    return {pid: problems[pid] for pid in pids}


def _read_pids(file: Path, split: str, digest: Any = None) -> list[str]:
    splits = _read_object(file, digest)
    if split not in splits:
        raise ConfigError(f"{file}: no split {split!r}; it holds {', '.join(splits)}")
    pids = splits[split]
    if not isinstance(pids, list) or not pids or not all(isinstance(pid, str) for pid in pids):
        raise DataError(f"{file}: split {split!r} must be a list of one pid (text) or more")
    return pids


def _read_object(file: Path, digest: Any = None) -> dict[str, Any]:
    advice = "give the problems.json and pid_splits.json of ScienceQA's folder"
    try:
        content = file.read_bytes()
        value = json.loads(content)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}; {advice}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected an object, got {type(value).__name__}; {advice}")
    if digest is not None:
        digest.update(content)
    return value


def read_choices(problem: Any, origin: str) -> tuple[list[str], int]:
    """The choices' texts, and the index of the right one. Raises DataError that begins with ``origin``."""
    if not isinstance(problem, dict):
        raise DataError(f"{origin}: expected an object, got {type(problem).__name__}", reason="not an object")
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{origin}: 'choices' must be a list of texts, got {choices!r:.80}", reason="bad 'choices'")
    if not 1 <= len(choices) <= len(LETTERS):
        raise DataError(
            f"{origin}: {len(choices)} choices; it must be 1 to {len(LETTERS)}, which have a letter",
            reason="too few or many choices",
        )
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{origin}: 'answer' is {answer!r}; it must be an index from 0 to {len(choices) - 1}, "
            f"as there are {len(choices)} choices",
            reason="'answer' is no index into the choices",
        )
    return choices, answer


def _parts(problem: Any, origin: str) -> dict[str, str]:
    choices, answer = read_choices(problem, origin)
    texts = {key: read_text(problem, key, origin) for key in ("question", "hint", "lecture", "solution")}
    # The converter writes line breaks as \n and reads them back, so a \n that stood there becomes a line break.
    lecture, solution = (texts[key].replace("\\n", "\n") for key in ("lecture", "solution"))
    return {
        "question": texts["question"],
        "context": texts["hint"].strip() or "N/A",
        "options": " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)),
        "answer": LETTERS[answer],
        "lecture": lecture,
        "solution": solution,
        "lecture_line": f"LECTURE: {lecture}\n" if lecture.strip() else "",
        "solution_line": f"SOLUTION: {solution}\n" if solution.strip() else "",
    }


def read_text(problem: dict[str, Any], key: str, origin: str) -> str:
    """A field that may be empty. Raises DataError that begins with ``origin`` when it is missing or no text."""
    value = problem.get(key)
    if not isinstance(value, str):
        got = repr(value)[:80] if key in problem else "nothing"
        raise DataError(f"{origin}: {key!r} must be a text (it may be empty), got {got}", reason=f"{key!r} is no text")
    return value


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip().removesuffix("BECAUSE:").strip()


def _images(problem: dict[str, Any], pid: str, split: str, root: Path, origin: str) -> tuple[str, ...]:
    image = problem.get("image")
    if image is None:
        return ()
    if not isinstance(image, str) or not image:
        raise DataError(
            f"{origin}: 'image' must be null or a file name, got {image!r:.80}", reason="'image' is no file name"
        )
    # Splits such as minival are parts of others, whose folders hold the images: the problem says which.
    folders = dict.fromkeys([str(problem.get("split", split)), split, ""])
    files = [root / folder / pid / image for folder in folders]
    for file in files:
        if file.is_file():
            return (str(file),)
    raise DataError(
        f"{origin}: no image file; looked for {', '.join(map(str, files))}; unpack the images there, "
        "or give the folder that holds them as data.image_root",
        reason="image file is missing",
    )
