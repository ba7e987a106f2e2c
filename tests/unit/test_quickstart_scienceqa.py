"""The problems in ScienceQA's layout: read by the source of the original, of every kind, and with one right answer."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from llava_ds.data.sources.scienceqa import format_problem, open_scienceqa
from llava_ds.evaluation.scienceqa_columns import COLUMNS, read_problems
from llava_ds.quickstart.concepts import load_concepts
from llava_ds.quickstart.scienceqa.prepare import NUM_PROBLEMS, write_scienceqa
from llava_ds.quickstart.scienceqa.problems import KINDS

# As problems.json of the original has them.
FIELDS = [
    "question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category", "skill",
    "lecture", "solution", "split",
]
NUMBERS = {"train": 210, "val": 77, "test": 140}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """What the quickstart prepares, as far as it is read: a colour for each style instead of a drawing."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "images").mkdir()
    (folder / "sources.json").write_text(json.dumps({"trained": ["twemoji"], "unseen": "noto"}))
    for concept in load_concepts():
        for style, suffix, colour in (("twemoji", "", "red"), ("twemoji", "-low", "red"), ("noto", "", "blue")):
            picture = Image.new("RGB", (16, 16), colour)
            picture.save(folder / "images" / f"{style}-{concept.code_points.lower()}{suffix}.png")
    Image.new("RGB", (16, 16), "green").save(folder / "images" / "scene-twemoji-0001.png")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, quickstart) -> Path:
    folder = tmp_path_factory.mktemp("scienceqa")
    write_scienceqa(folder, quickstart, NUMBERS)
    return folder


@pytest.fixture(scope="module")
def problems(written) -> dict:
    return json.loads((written / "problems.json").read_text())


def test_the_layout_is_the_originals(written, problems, quickstart, tmp_path):
    splits = json.loads((written / "pid_splits.json").read_text())
    assert {name: len(splits[name]) for name in NUMBERS} == NUMBERS
    assert set(splits) == {*NUMBERS, "trainval", "minitrain", "minival", "minitest"}
    assert splits["train"] + splits["val"] + splits["test"] == list(problems)
    for split in splits:
        source = open_scienceqa(written, None, split)
        assert sum(bool(source[index].images) for index in range(len(source))) > 20
    assert all(list(problem) == FIELDS for problem in problems.values())
    write_scienceqa(tmp_path, quickstart, NUMBERS)  # a pure function
    assert json.loads((tmp_path / "problems.json").read_text()) == problems


def test_pictures_of_the_test_split_are_in_the_unseen_style(written, problems):
    colours = Counter()
    for pid, problem in problems.items():
        if problem["image"]:
            red, green, blue = Image.open(written / "images" / problem["split"] / pid / "image.png").getpixel((4, 4))
            if (red, green, blue) != (255, 255, 255):  # the empty part of a map
                colours[problem["split"], "red" if red > blue else "blue"] += 1
    assert set(colours) == {("train", "red"), ("val", "red"), ("test", "blue")}


def test_every_column_of_the_paper_has_problems(written):
    for split in NUMBERS:
        found, _ = read_problems(written / "problems.json", written / "pid_splits.json", split)
        counts = Counter(column for problem in found.values() for column in problem.columns)
        assert set(counts) == set(COLUMNS) and min(counts.values()) > 10, counts
    assert all(number % len(KINDS) == 0 for number in NUM_PROBLEMS.values())  # of every kind the same


def test_contexts_choices_and_grades_are_mixed(problems):
    values = problems.values()
    assert {len(problem["choices"]) for problem in values} == {2, 3, 4, 5}
    assert {problem["grade"] for problem in values} == {f"grade{number}" for number in range(1, 13)}
    assert len({(bool(problem["image"]), bool(problem["hint"])) for problem in values}) == 4


def test_guessing_is_right_once_in_as_many_times_as_there_are_choices(problems):
    answers: dict[tuple[str, int], Counter] = defaultdict(Counter)
    for problem in problems.values():
        answers[problem["skill"], len(problem["choices"])][problem["answer"]] += 1
    assert len(answers) == len(KINDS)
    for (skill, num_choices), counts in answers.items():
        assert set(counts) == set(range(num_choices)), skill
        number = sum(counts.values())
        spread = 4 * (number * (1 - 1 / num_choices) / num_choices) ** 0.5  # four standard deviations
        assert max(counts.values()) < number / num_choices + spread, (skill, counts)


def test_the_right_choice_is_right_and_the_reasons_name_it(problems):
    concepts = {concept.name: concept for concept in load_concepts()}
    checked = Counter()
    for pid, problem in problems.items():
        choices, right = problem["choices"], problem["choices"][problem["answer"]]
        assert len(set(choices)) == len(choices)
        question, answer = format_problem(problem, "QCM-LEA", pid)
        letter = "ABCDE"[problem["answer"]]
        assert right in problem["solution"]
        assert f"({letter}) {right}" in question and answer.endswith(f"The answer is {letter}.")
        checked[problem["skill"]] += 1
        match problem["skill"]:
            case "Sort words":
                name = problem["question"].removeprefix("Is ").removesuffix(" nature or food?")
                assert concepts[name].category == right
            case "Identify things":
                name = problem["question"].removeprefix("What is ").removesuffix("?")
                assert concepts[name].subcategory.split()[0] == right
            case "Find a place":
                name = problem["question"].removeprefix("Where is the ").removesuffix("?")
                assert problem["hint"] == f"{right} {name}"
            case "Count words":
                assert len(problem["hint"].split(", ")) == int(right)
    assert len(checked) == len(KINDS) and min(checked.values()) > 50


def test_a_map_shows_as_many_things_as_are_right(written, problems):
    counts = Counter()
    for pid, problem in problems.items():
        if problem["skill"] == "Read a map":
            picture = Image.open(written / "images" / problem["split"] / pid / "image.png")
            corners = [picture.getpixel((x, y)) for x in (4, 12) for y in (4, 12)]
            counts[sum(corner != (255, 255, 255) for corner in corners), problem["answer"] + 1] += 1
    assert set(counts) == {(number, number) for number in range(1, 5)}
