"""ScienceQA problems become the paper's texts, in every prompt format."""

import copy
import json
import pickle
import random
from collections import Counter

import pytest

from llava_ds.data.sources.scienceqa import INPUT_FORMATS, OUTPUT_FORMATS, format_problem, open_scienceqa, read_split
from llava_ds.errors import ConfigError, DataError
from llava_ds.schema import Sample, Turn

PROBLEM = {
    "question": "Which is  heavier?",
    "choices": ["a feather", "a stone"],
    "answer": 1,
    "hint": "Look at the picture.",
    "image": None,
    "lecture": "Mass is\nmatter.",
    "solution": "Stones are dense.",
    "split": "train",
    "subject": "natural science",
}
Q, C, M = "Which is heavier?", "Context: Look at the picture.", "Options: (A) a feather (B) a stone"
L, E = "Mass is\nmatter.", "Stones are dense."
INPUTS = {
    "CQM": f"{C}\nQuestion: {Q}\n{M}",
    "QCM": f"{Q}\n{C}\n{M}",
    "QCML": f"{Q}\n{C}\n{M}\nBECAUSE: {L}",
    "QCME": f"{Q}\n{C}\n{M}\nBECAUSE: {E}",
    "QCMLE": f"{Q}\n{C}\n{M}\nBECAUSE: {L} {E}",
    "QCLM": f"{Q}\n{C}\nBECAUSE: {L}\n{M}",
    "QCEM": f"{Q}\n{C}\nBECAUSE: {E}\n{M}",
    "QCLEM": f"{Q}\n{C}\nBECAUSE: {L} {E}\n{M}",
}
OUTPUTS = {
    "A": "The answer is B.",
    "AL": f"The answer is B. BECAUSE: {L}",
    "AE": f"The answer is B. BECAUSE: {E}",
    "ALE": f"The answer is B. BECAUSE: {L} {E}",
    "AEL": f"The answer is B. BECAUSE: {E} {L}",
    "LA": f"{L} The answer is B.",
    "EA": f"{E} The answer is B.",
    "LEA": f"{L} {E} The answer is B.",
    "ELA": f"{E} {L} The answer is B.",
    "LEPA": f"LECTURE: {L}\nSOLUTION: {E}\n###\nANSWER: B.",
}


def _write(folder, problems=None, splits=None):
    problems = {"1": PROBLEM} if problems is None else problems
    splits = {"train": list(problems), "test": []} if splits is None else splits
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


@pytest.mark.parametrize("input_format", INPUT_FORMATS)
@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_every_prompt_format(input_format, output_format):
    texts = format_problem(PROBLEM, f"{input_format}-{output_format}", "p")
    assert texts == (INPUTS[input_format], OUTPUTS[output_format])


def test_all_formats_are_covered():
    assert (set(INPUTS), set(OUTPUTS)) == (set(INPUT_FORMATS), set(OUTPUT_FORMATS))


@pytest.mark.parametrize(
    ("changes", "prompt_format", "texts"),
    [
        ({"hint": " "}, "QCM-A", (f"{Q}\nContext: N/A\n{M}", "The answer is B.")),
        ({"lecture": ""}, "QCML-AL", (f"{Q}\n{C}\n{M}", "The answer is B.")),
        ({"lecture": "", "solution": ""}, "QCM-LEA", (f"{Q}\n{C}\n{M}", "The answer is B.")),
        ({"lecture": ""}, "QCM-LEA", (f"{Q}\n{C}\n{M}", f"{E} The answer is B.")),
        ({"lecture": "", "solution": " "}, "QCM-LEPA", (f"{Q}\n{C}\n{M}", "###\nANSWER: B.")),
        ({"solution": "a\\nb   c"}, "QCM-EA", (f"{Q}\n{C}\n{M}", "a\nb  c The answer is B.")),
        (
            {"question": "Is {this} a Question: 1?"},
            "QCM-A",
            (f"Is {{this}} a Question: 1?\n{C}\n{M}", "The answer is B."),
        ),
    ],
)
def test_texts_with_empty_parts_and_odd_characters(changes, prompt_format, texts):
    assert format_problem(PROBLEM | changes, prompt_format, "p") == texts


def test_samples_of_a_split_with_and_without_images(tmp_path):
    problems = {
        "1": PROBLEM,
        "2": PROBLEM | {"image": "image.png", "split": "val"},
        "3": PROBLEM | {"image": "image.png"},
        "4": PROBLEM,
    }
    root = tmp_path / "images"
    for place in ("val/2", "3"):
        (root / place).mkdir(parents=True)
        (root / place / "image.png").touch()
    source = open_scienceqa(_write(tmp_path, problems, {"minival": ["3", "1", "2"], "train": ["4"]}), None, "minival")
    turns = (Turn("user", INPUTS["QCM"]), Turn("assistant", OUTPUTS["LEA"]))
    with_image = (Turn("user", f"{INPUTS['QCM']}\n<image>"), turns[1])
    wanted = [
        Sample("3", (str(root / "3/image.png"),), with_image, "problems.json['3']"),
        Sample("1", (), turns, "problems.json['1']"),
        Sample("2", (str(root / "val/2/image.png"),), with_image, "problems.json['2']"),
    ]
    assert list(source) == wanted
    assert list(pickle.loads(pickle.dumps(source))) == wanted
    assert open_scienceqa(tmp_path, root, "minival", "CQM-A")[1].turns == (
        Turn("user", INPUTS["CQM"]),
        Turn("assistant", OUTPUTS["A"]),
    )


def test_a_missing_image_names_where_it_was_looked_for(tmp_path):
    source = open_scienceqa(_write(tmp_path, {"1": PROBLEM | {"image": "image.png"}}), tmp_path / "img")
    with pytest.raises(
        DataError, match=r"problems.json\['1'\]: no image file; looked for .*img/train/1/image.png, .*img/1/image.png"
    ):
        source[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, r"p: 'answer' is 2; it must be an index from 0 to 1"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": True}, "'answer' is True"),
        ({"answer": None}, "'answer' is None"),
        ({"choices": []}, "0 choices"),
        ({"choices": ["x"] * 27}, "27 choices"),
        ({"choices": "ab"}, "'choices' must be a list of texts"),
        ({"hint": None}, "'hint' must be a text"),
        ({"question": 3}, "'question' must be a text.*got 3"),
    ],
)
def test_a_bad_problem_is_named(changes, message):
    with pytest.raises(DataError, match=message):
        format_problem(PROBLEM | changes, "QCM-LEA", "p")


@pytest.mark.parametrize("key", ["question", "choices", "answer", "hint", "lecture", "solution"])
def test_a_missing_field_is_named(key):
    with pytest.raises(DataError, match=f"p: .*{key!r}"):
        format_problem({name: value for name, value in PROBLEM.items() if name != key}, "QCM-LEA", "p")


@pytest.mark.parametrize("prompt_format", ["QCM", "LEA", "QCM-", "-A", "qcm-lea", "QCM-LEA-A", "QCM_A", ""])
def test_an_unknown_prompt_format_lists_the_known_ones(tmp_path, prompt_format):
    with pytest.raises(ConfigError, match="QCM, QCML.*LEA, ELA, LEPA"):
        open_scienceqa(_write(tmp_path), None, "train", prompt_format)


def test_an_unknown_split_an_empty_one_and_a_pid_without_problem(tmp_path):
    _write(tmp_path, splits={"train": ["1", "9"], "test": []})
    with pytest.raises(ConfigError, match="no split 'dev'; it holds train, test"):
        open_scienceqa(tmp_path, None, "dev")
    with pytest.raises(DataError, match="split 'test' must be a list of one pid"):
        open_scienceqa(tmp_path, None, "test")
    with pytest.raises(DataError, match=r"problems.json\['9'\]: no such problem, but split 'train'"):
        open_scienceqa(tmp_path, None)[1]


def test_a_pid_that_stands_twice_is_not_scored_once(tmp_path):
    _write(tmp_path, {"1": PROBLEM, "2": PROBLEM}, {"test": ["2", "1", "2"]})
    with pytest.raises(DataError, match=r"pid_splits.json: 1 pid\(s\) stand more than once in 'test': 2; keep one"):
        read_split(tmp_path / "problems.json", tmp_path / "pid_splits.json", "test")


@pytest.mark.parametrize(
    ("name", "content"),
    [("problems.json", "[]"), ("problems.json", "{"), ("pid_splits.json", "3"), ("pid_splits.json", None)],
)
def test_broken_files_are_named(tmp_path, name, content):
    _write(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        open_scienceqa(tmp_path, None)


def test_the_fingerprint_follows_files_and_settings(tmp_path):
    _write(tmp_path, {"1": PROBLEM, "2": PROBLEM}, {"train": ["1"], "val": ["1"]})
    prints = [open_scienceqa(tmp_path, None, *rest).fingerprint for rest in ((), ("val",), ("train", "QCM-A"), ())]
    assert prints[0] == prints[3]
    _write(tmp_path, {"1": PROBLEM | {"hint": ""}})
    prints.append(open_scienceqa(tmp_path, None).fingerprint)
    assert len(set(prints)) == 4


def test_mutated_problems_give_samples_or_data_errors(tmp_path):
    rng = random.Random(0)
    odd = [None, 3, -1, True, 1.5, "", "\ud800", "x\0y", [], ["a"], {}, {"a": 1}, [None], "../" * 3]
    problems = {}
    for pid in range(600):
        problem = copy.deepcopy(PROBLEM)
        problem[rng.choice(list(problem))] = rng.choice(odd)
        problems[str(pid)] = problem if rng.random() < 0.95 else rng.choice(odd)
    source = open_scienceqa(_write(tmp_path, problems), None)
    outcomes = Counter()
    for number in range(len(source)):
        try:
            outcomes["good"] += isinstance(source[number], Sample)
        except DataError as error:
            assert f"problems.json['{number}']" in str(error)
            outcomes[error.reason] += 1
    assert outcomes["good"] > 100
    assert len(outcomes) > 8


def test_mutated_files_open_or_are_refused(tmp_path):
    content = _write(tmp_path).joinpath("problems.json").read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        mutated = bytearray(content)
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        (tmp_path / "problems.json").write_bytes(mutated)
        try:
            assert isinstance(open_scienceqa(tmp_path, None)[0], Sample)
        except DataError:
            refused += 1
    assert 50 < refused < 300
