"""Two scores out of a judge's words: every form that is clear, and a refusal of all others."""

from random import Random

import pytest

from llava_ds.errors import DataError
from llava_ds.evaluation.judge_parsing import parse_scores
from llava_ds.evaluation.official_review import FAILED, official_scores

REASONS = {"empty", "no number", "one number", "no plain pair of numbers", "out of range", "only one score out of ten"}


@pytest.mark.parametrize(
    "line",
    [
        "8 9", "8, 9", "8,9", "8;9", "8 | 9", "8 & 9", "8 and 9", "8, and 9", "8\t9", "  8   9  ", "8.0 9.00", "8 9.",
        "8 9\r", "(8, 9)", "[8, 9]", "**8 9**", "**8** **9**", "`8 9`", "## 8 9", "8/10 9/10", "8/10, 9/10",
        "8 / 10 and 9 / 10.", "8 out of 10, 9 out of 10", "Scores: 8 9", "Score: 8, 9",
        "The scores are 8 and 9.", "Ratings = 8 9",
        "Assistant 1: 8, Assistant 2: 9", "Assistant 1: 8 Assistant 2: 9", "assistant 1 = 8/10; assistant 2 = 9/10",
        "**Assistant 1:** 8, **Assistant 2:** 9", "Assistant 1's score: 8. Assistant 2's score: 9.",
        "Assistant 2: 9, Assistant 1: 8", "Scores: Assistant 1: 8 and Assistant 2: 9", "Assistant 1: 8\nAssistant 2: 9",
        "Assistant 2: 9\n\n**Assistant 1:** 8", "\n\n8 9",
    ],
)
def test_clear_forms(line):
    assert parse_scores(line) == (8.0, 9.0)
    assert parse_scores(line + "\nAssistant 1 was wrong in 3 places, Assistant 2 in 1.") == (8.0, 9.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"), ("  \n \n", "empty"), ("***", "empty"), ("Both are good.", "no number"), ("8", "one number"),
        ("8.9", "one number"), ("8/10", "no plain pair of numbers"), ("8/9", "no plain pair of numbers"),
        ("8-9", "no plain pair of numbers"), ("8:9", "no plain pair of numbers"),
        ("8 9 10", "no plain pair of numbers"),
        ("8,5 9,0", "no plain pair of numbers"), ("8*9", "one number"), ("8/100 9/100", "no plain pair of numbers"),
        ("8/10 9/10/10", "no plain pair of numbers"), ("8 9 is what I would give", "no plain pair of numbers"),
        ("8 9/10", "only one score out of ten"), ("8/10 9", "only one score out of ten"), ("0 5", "out of range"),
        ("8 11", "out of range"), ("-1 -1", "out of range"), ("8 -9", "out of range"), ("0.9 5", "out of range"),
        ("Assistant 1: 0, Assistant 2: 9", "out of range"),
        ("Assistant 1: 8, Assistant 1: 9", "no plain pair of numbers"),
        ("Assistant 1: 8", "no plain pair of numbers"), ("Assistant 1: 8, Assistant 3: 9", "no plain pair of numbers"),
        ("nan nan", "no number"), ("eight nine", "no number"), ("Scores:\n8 9", "no number"), ("Hm.\n8 9", "no number"),
        ("Assistant 1: 8/10, Assistant 2: 9", "no plain pair of numbers"), ("٨ ٩", "no number"),
    ],
)
def test_what_is_refused(text, reason):
    with pytest.raises(DataError) as raised:
        parse_scores(text)
    assert raised.value.reason == reason and reason in REASONS


def test_another_role():
    assert parse_scores("Model 2: 9, Model 1: 8", role="Model") == (8.0, 9.0)
    with pytest.raises(DataError):
        parse_scores("Assistant 1: 8, Assistant 2: 9", role="Model")


def test_every_pair_in_every_form():
    scores = [tenth / 10 for tenth in range(10, 101)]
    forms = ["{} {}", "{}, {}", "{}/10 {}/10", "{} and {}", "Assistant 1: {}, Assistant 2: {}", "**{}** | **{}**"]
    rng = Random(0)
    for first in scores:
        second, form = rng.choice(scores), rng.choice(forms)
        assert parse_scores(form.format(f"{first:g}", f"{second:g}")) == (first, second)


def test_random_text_is_read_as_the_official_script_reads_it_or_refused():
    """Whatever is read lies in the range; where the official script reads the same first line, both agree."""
    rng = Random(1)
    pieces = ["8", "9", "10", "1", "0", "8.5", " ", " ", " ", ",", ", ", "/", "/10", "-", ".", "\n", "and", " and ",
              "Assistant 1: ", "Assistant 2: ", "*", "(", ")", "x"]
    num_read = num_both = 0
    for _ in range(20_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 6)))
        try:
            scores = parse_scores(text)
        except DataError as error:
            assert error.reason in REASONS
            continue
        num_read += 1
        assert all(1 <= score <= 10 for score in scores), text
        official = official_scores(text)
        if official != FAILED:
            num_both += 1
            assert official == scores, text
    assert num_read > 100 and num_both > 30, (num_read, num_both)


@pytest.mark.parametrize(
    ("text", "scores"),
    [("8 9\nwhy", (8, 9)), ("8,9", (8, 9)), ("8, 9", FAILED), ("8 9 ", FAILED), ("", FAILED), ("a b", FAILED),
     ("0 11", (0, 11)), ("\n8 9", FAILED), ("8 9\r", (8, 9))],
)
def test_the_official_parser(text, scores):
    assert official_scores(text) == scores
