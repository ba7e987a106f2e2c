"""A model's answers to questions: in batches, shared between ranks, kept as they come.

Every rank has a whole model. The questions that have no answer yet are sorted by length, longest first, and dealt to
the ranks in turn: batches are padded little, ranks have alike to do, and too little memory shows at the beginning. The
ranks exchange nothing until all have answered; that wait is as long as it takes (see ``gather_objects``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

from llava_ds.distributed import Ranks, run_on_all, run_on_main
from llava_ds.errors import DataError
from llava_ds.evaluation.prediction_file import Part, PredictionFile
from llava_ds.evaluation.questions import Question
from llava_ds.inference.session import Sampling, Session

Log = Callable[[str], None]
ALONE = Ranks(0, 0, 1)


def predict(
    questions: Sequence[Question],
    open_session: Callable[[], Session],
    sampling: Sampling,
    batch_size: int,
    ranks: Ranks = ALONE,
    kept: PredictionFile | None = None,
    log: Log = lambda _: None,
) -> list[str]:
    """[num_questions] the answers, in the order of the questions, on every rank.

    ``kept`` has the answers of earlier launches, on whatever number of ranks, and gets the new ones; only the questions
    without an answer are asked. Without one no model is loaded.

    Raises DataError that lists the questions whose images do not decode, after everything else was answered.
    """
    answers = run_on_main(ranks, kept.begin) if kept else {}
    left = [one for one in questions if one.id not in answers]
    if answers:
        log(f"{len(questions) - len(left)} of {len(questions)} questions have an answer already")
    if left:
        share = partial(_answer_share, left, open_session, sampling, batch_size, ranks, kept, log)
        for found in run_on_all(ranks, share):
            answers |= found
    return [answers[one.id] for one in questions]


def share_questions(lengths: Sequence[int], ids: Sequence[str], rank: int, world_size: int) -> list[int]:
    """The positions of the questions that a rank answers, longest first."""
    order = sorted(range(len(ids)), key=lambda number: (-lengths[number], ids[number]))
    return order[rank::world_size]


def _answer_share(
    questions: Sequence[Question],
    open_session: Callable[[], Session],
    sampling: Sampling,
    batch_size: int,
    ranks: Ranks,
    kept: PredictionFile | None,
    log: Log,
) -> dict[str, str]:
    session = open_session()
    lengths = [session.prompt_length(one.turns) for one in questions]
    numbers = share_questions(lengths, [one.id for one in questions], ranks.rank, ranks.world_size)
    log(f"asking {len(questions)} questions, {len(numbers)} of them on each of {ranks.world_size} rank(s)")
    answers: dict[str, str] = {}
    problems: list[str] = []
    with kept.part(ranks.rank) if kept else nullcontext(Part(None)) as part:
        for start in range(0, len(numbers), batch_size):
            batch = [questions[number] for number in numbers[start : start + batch_size]]
            found = _answer_good(session, batch, sampling, problems)
            part.add(found)
            answers |= found
            log(f"answered {min(start + batch_size, len(numbers))} of {len(numbers)}")
    if problems:
        raise DataError("\n".join(problems))
    return answers


def _answer_good(
    session: Session, batch: Sequence[Question], sampling: Sampling, problems: list[str]
) -> dict[str, str]:
    """The answers but to questions with a bad image, whose errors go to ``problems``."""
    try:
        return _answer(session, batch, sampling)
    except DataError as error:
        if len(batch) == 1:
            problems.append(f"{batch[0].origin}: {error}")
            return {}
    one_by_one = [_answer_good(session, [one], sampling, problems) for one in batch]
    return {id: text for found in one_by_one for id, text in found.items()}


def _answer(session: Session, batch: Sequence[Question], sampling: Sampling) -> dict[str, str]:
    ids = [one.id for one in batch]
    texts = session.answer_batch([one.turns for one in batch], [one.images for one in batch], sampling, ids)
    return dict(zip(ids, texts, strict=True))
