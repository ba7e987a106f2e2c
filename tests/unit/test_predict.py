"""Answers to questions: the same however they are batched, shared and interrupted; nothing of other settings."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_ds.distributed import Ranks
from llava_ds.errors import ConfigError, DataError
from llava_ds.evaluation.predict import predict, share_questions
from llava_ds.evaluation.prediction_file import PredictionFile
from llava_ds.evaluation.questions import Question, check_questions, hash_questions
from llava_ds.inference.row_sampling import RowSampling
from llava_ds.inference.session import Sampling, Session, load_session
from llava_ds.schema import Turn
from tests.helpers.tiny import write_run, write_world

GREEDY, DRAWN = Sampling(6), Sampling(6, temperature=1.5, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    root = write_world(tmp_path_factory.mktemp("predict"))
    return load_session(write_run(root))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[Question]:
    """Of seven, two have no image; lengths differ."""
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number in range(7):
        image = folder / f"{number}.png"
        Image.new("RGB", (44, 50), (30 * number, 99, 200 - 20 * number)).save(image)
        has_image = number % 3 != 1
        text = "<image>\n" * has_image + "Where is the fox? " * (1 + number * 2 % 5)
        made.append(Question(f"q{number}", (Turn("user", text),), (image,) * has_image, f"here[{number}]", {}))
    return made


def _alone(session: Session, question: Question, sampling: Sampling) -> str:
    return session.answer_batch([question.turns], [question.images], sampling, [question.id])[0]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_an_answer_does_not_depend_on_its_batch(session, questions, sampling):
    expected = [_alone(session, one, sampling) for one in questions]
    assert len(set(expected)) > 3
    for batch_size in (2, 3, 7):
        assert predict(questions, lambda: session, sampling, batch_size) == expected


def test_a_draw_depends_on_seed_and_id(session, questions):
    texts = {_alone(session, one, DRAWN) for one in (questions[0], replace(questions[0], id="another"))}
    texts |= {_alone(session, questions[0], replace(DRAWN, seed=seed)) for seed in (4, 5)}
    assert len(texts) == 4
    assert _alone(session, questions[0], DRAWN) in texts


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0])
    rows = 4000
    draw = RowSampling([str(row) for row in range(rows)], seed=0, temperature=0.7, top_p=1.0)
    found = draw(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, 4)).argmax(-1)
    expected = (logits / 0.7).softmax(0)
    # Four standard errors of the largest share.
    assert torch.allclose(found.bincount(minlength=4) / rows, expected, rtol=0, atol=0.032)


def test_top_p_leaves_the_improbable_out():
    logits = torch.tensor([3.0, 2.0, -1.0, -2.0])
    draw = RowSampling([str(row) for row in range(500)], seed=0, temperature=1.0, top_p=0.8)
    assert set(draw(torch.zeros(500, 1, dtype=torch.long), logits.expand(500, 4)).argmax(-1).tolist()) == {0, 1}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_are_disjoint_whole_and_alike(world_size):
    lengths = [5, 90, 7, 7, 30, 12, 5]
    ids = [f"q{n}" for n in range(7)]
    shares = [share_questions(lengths, ids, rank, world_size) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares[0][0] == 1
    assert all([lengths[n] for n in share] == sorted((lengths[n] for n in share), reverse=True) for share in shares)


def _kept(folder: Path, questions: list[Question], **more: object) -> PredictionFile:
    return PredictionFile(folder / "answers.jsonl", {"questions": hash_questions(questions), **more})


def _finish(kept: PredictionFile, questions: list[Question], answers: list[str]) -> None:
    kept.finish([{"id": one.id, "text": text} for one, text in zip(questions, answers, strict=True)])


def test_what_was_answered_is_not_asked_again(tmp_path, session, questions):
    expected = predict(questions, lambda: session, GREEDY, 3)
    kept = _kept(tmp_path, questions)
    assert kept.begin() == {}
    with kept.part(5) as part:  # of a launch on more ranks, which was killed while it wrote
        part.add({"q2": "kept", "q4": "kept too"})
        part._handle.write('\0\0\0\n{"id": "q5", "te')
    asked = []

    class Watched:
        prompt_length = session.prompt_length

        def answer_batch(self, turns, images, sampling, ids):
            asked.extend(ids)
            return session.answer_batch(turns, images, sampling, ids)

    answers = predict(questions, Watched, GREEDY, 3, kept=_kept(tmp_path, questions))
    assert sorted(asked) == ["q0", "q1", "q3", "q5", "q6"]
    assert answers == [*expected[:2], "kept", expected[3], "kept too", *expected[5:]]
    _finish(kept, questions, answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.settings.json"]

    def no_session():
        raise AssertionError("a model was loaded")

    assert predict(questions, no_session, GREEDY, 3, kept=_kept(tmp_path, questions)) == answers


def test_answers_of_other_settings_are_not_mixed(tmp_path, questions):
    kept = _kept(tmp_path, questions, temperature=0.0, checkpoint="a")
    kept.begin()
    _kept(tmp_path, questions, temperature=0.5, checkpoint="a").begin()  # nothing was answered yet
    kept.begin()
    with kept.part(0) as part:
        part.add({"q1": "yes"})
    other = _kept(tmp_path, questions[1:], temperature=0.2, checkpoint="a")
    with pytest.raises(ConfigError) as raised:
        other.begin()
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{kept.file} holds answers of other settings:"
    assert lines[2] == "  temperature: 0.0 there, 0.2 now"
    assert lines[1].startswith("  questions: ") and len(lines) == 4
    assert "give another file, or remove" in lines[3] and "answers.jsonl.parts" in lines[3]
    assert kept.begin() == {"q1": "yes"}

    _finish(kept, questions[1:2], ["yes"])
    (tmp_path / "answers.jsonl.settings.json").unlink()
    with pytest.raises(ConfigError, match="no answers.jsonl.settings.json says of what"):
        kept.begin()


def test_launches_that_begin_together_are_told_apart(tmp_path, questions):
    one, other = (_kept(tmp_path, questions, temperature=value) for value in (0.0, 0.5))
    assert one.begin() == other.begin() == {}
    with one.part(0) as first, other.part(0) as second:
        first.add({"q1": "cold"})
        second.add({"q2": "warm"})
    for launch in (one, other):
        with pytest.raises(ConfigError, match="(?s)answers of other settings.*give another file, or remove") as raised:
            launch.begin()
        with pytest.raises(ConfigError, match=re.escape(str(raised.value))):
            launch.finish([])
    assert not one.file.exists()


def test_launches_of_the_same_settings_may_both_finish(tmp_path, questions):
    launches = [_kept(tmp_path, questions) for _ in range(2)]
    for launch in launches:
        launch.begin()
    for launch in launches:
        with launch.part(0) as part:
            part.add({"q1": "yes"})
        _finish(launch, questions[1:2], ["yes"])
    assert _kept(tmp_path, questions).begin() == {"q1": "yes"}


@pytest.mark.parametrize("text", ["{", "", "[]", "null"])
def test_damaged_settings_say_what_to_remove(tmp_path, questions, text):
    kept = _kept(tmp_path, questions)
    _finish(kept, questions[:1], ["yes"])
    (tmp_path / "answers.jsonl.settings.json").write_text(text)
    with pytest.raises(ConfigError, match="settings.json: damaged.*give another file, or remove"):
        kept.begin()


NO_ANSWERS = {
    "123": "expected an object, got int",
    "null": "expected an object, got NoneType",
    '{"id": "1"}': "the answer must be text .*got None",
    '{"id": "1", "text": null}': "the answer must be text .*got None",
    '{"text": "x"}': "has neither 'id' nor 'question_id'",
    '{"id": "1", "question_id": 2, "text": "x"}': "'id' and 'question_id' differ",
}


@pytest.mark.parametrize(("line", "message"), NO_ANSWERS.items())
def test_a_line_that_is_no_answer_is_named(tmp_path, questions, line, message):
    kept = _kept(tmp_path, questions)
    kept.begin()
    with kept.part(0) as part:
        part.add({"q1": "yes"})
        part._handle.write(f"{line}\n")
    with pytest.raises(DataError, match=f"rank-00000-.*jsonl:2: {message}.*; remove that line"):
        kept.begin()
    _finish(kept, [], [])
    kept.file.write_text(f'{{"id": 7, "question_id": "7", "text": ""}}\n{line}\n')
    with pytest.raises(DataError, match=f"not a file of answers: .*answers.jsonl:2: {message}"):
        kept.begin()


def test_an_id_that_stands_twice_is_refused(tmp_path, questions):
    (tmp_path / "answers.jsonl").write_text('{"id": 7, "text": "x"}\n{"question_id": "7", "text": "y"}\n')
    with pytest.raises(DataError, match="answers.jsonl:2: id '7' stands twice"):
        _kept(tmp_path, questions).begin()


def test_a_file_of_something_else_is_not_taken_for_answers(tmp_path, questions):
    (tmp_path / "answers.jsonl").write_text("# notes\n")
    with pytest.raises(DataError, match="answers.jsonl: not a file of answers"):
        _kept(tmp_path, questions).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_bad_pictures_are_all_named_and_cost_no_other_answer(tmp_path, session, questions):
    bad = list(questions)
    for number in (3, 5):
        broken = tmp_path / f"broken{number}.png"
        broken.write_bytes(b"no picture")
        bad[number] = replace(bad[number], images=(broken,))
    kept = _kept(tmp_path, bad)
    with pytest.raises(DataError) as raised:
        predict(bad, lambda: session, GREEDY, 7, kept=kept)
    named = sorted(str(raised.value).splitlines())
    assert [line[: line.index(":")] for line in named] == ["here[3]", "here[5]"]
    assert all(f"broken{number}.png does not decode" in line for number, line in zip((3, 5), named, strict=True))
    assert sorted(kept.begin()) == ["q0", "q1", "q2", "q4", "q6"]


def test_missing_pictures_and_repeated_ids_are_listed_together(tmp_path, questions):
    gone = [replace(one, images=(tmp_path / f"{one.id}.png",)) for one in questions[:6]]
    with pytest.raises(DataError) as raised:
        check_questions([*gone, questions[6], questions[6]], Path("q.json"), "Mend it.")
    text = str(raised.value)
    assert "q.json: 6 image file(s) are missing, the first:\n  here[0]: " in text and "q4.png\n  Mend it." in text
    assert "q5.png" not in text
    assert "2 id(s) stand more than once, the first:\n  here[6]: id 'q6' stands 2 times" in text


def test_the_hash_of_questions_sees_what_a_model_sees(questions):
    first = questions[0]
    others = [
        replace(first, id="x"),
        replace(first, turns=(Turn("user", "Who?"),)),
        replace(first, images=questions[2].images),
    ]
    hashes = [hash_questions([one, *questions[1:]]) for one in (first, *others)]
    assert len(set(hashes)) == 4
    assert hash_questions([replace(first, origin="elsewhere", record={"a": 1}), *questions[1:]]) == hashes[0]


def test_ranks_that_are_not_main_answer_their_share(session, questions, monkeypatch):
    """Two ranks one after the other, each told of the other's answers."""
    expected = predict(questions, lambda: session, GREEDY, 2)
    found = []

    def in_turn(_ranks, work):
        found.append(work())
        return found

    monkeypatch.setattr("llava_ds.evaluation.predict.run_on_all", in_turn)
    ask = partial(predict, questions, lambda: session, GREEDY, 2)
    with pytest.raises(KeyError):  # the other rank's answers are not there
        ask(ranks=Ranks(1, 1, 2))
    assert ask(ranks=Ranks(0, 0, 2)) == expected
    assert sorted(map(len, found)) == [3, 4]
