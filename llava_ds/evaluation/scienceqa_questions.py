"""The problems of a ScienceQA split as questions to a model."""

from __future__ import annotations

from pathlib import Path

from llava_ds.data.sources.scienceqa import open_scienceqa
from llava_ds.errors import DataError
from llava_ds.evaluation.questions import Question, check_questions
from llava_ds.schema import Sample, Turn
from llava_ds.text.placement import place_first_images

MAX_NEW_TOKENS = 1024  # of the official code
ANSWER_DIRECTLY = "Answer with the option's letter from the given choices directly."


def read_questions(
    folder: Path,
    image_root: Path | None = None,
    split: str = "test",
    prompt_format: str = "QCM-LEA",
    directly: bool = False,
    image_first: bool = True,
) -> list[Question]:
    """The questions of ``folder``'s split as training asks them, in the order of ``pid_splits.json``.

    ``directly`` adds that the letter alone is wanted. ``image_first`` puts the image before the question, else it
    stands behind it.

    Raises ConfigError for an unknown split or prompt format; DataError for missing files, and one that lists all bad
    problems.
    """
    source = open_scienceqa(folder, image_root, split, prompt_format)
    questions, problems = [], []
    for index in range(len(source)):
        try:
            questions.append(_question(source[index], directly, image_first))
        except DataError as error:
            problems.append(str(error))
    if problems:
        listed = "\n".join(problems[:5])
        raise DataError(f"{folder}: {len(problems)} of {len(source)} problems cannot be asked, the first:\n{listed}")
    check_questions(questions, folder / "pid_splits.json", "Give the folder that holds them with --image-root.")
    return questions


def _question(sample: Sample, directly: bool, image_first: bool) -> Question:
    asked = place_first_images(sample, image_first).turns[0].text
    text = f"{asked}\n{ANSWER_DIRECTLY}" if directly else asked
    images = tuple(Path(str(image)) for image in sample.images)
    return Question(sample.id, (Turn("user", text),), images, sample.origin, {})
