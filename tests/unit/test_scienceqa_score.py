"""Files of predictions, the columns of the table, and the ensembles' rules, against numbers counted by hand."""

import json

import pytest

from llava_ds.api.budget import Budget
from llava_ds.api.cache import ReplyCache
from llava_ds.api.client import ChatClient
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.limits import Limits
from llava_ds.api.messages import ChatRequest, Message
from llava_ds.api.retries import RetryPolicy
from llava_ds.errors import BackendUnavailableError, ConfigError, DataError
from llava_ds.evaluation.scienceqa_answers import MISSING, NO_LETTER, OUT_OF_RANGE, REASONS, Answer
from llava_ds.evaluation.scienceqa_columns import COLUMNS, PAPER_ROWS, format_table, read_problems
from llava_ds.evaluation.scienceqa_ensembles import complement, count_cases, judge, to_judge
from llava_ds.evaluation.scienceqa_predictions import Prediction, read_predictions
from llava_ds.evaluation.scienceqa_score import decide, official_images, summarise, table_row
from llava_ds.evaluation.scienceqa_text_model import ask_all
from tests.helpers.fault_proxy import fault_proxy
from tests.helpers.scienceqa import PROBLEMS, problem, write_predictions, write_scienceqa

TEXTS = {"1": "A", "2": "The answer is B.", "3": "(C)", "4": "D", "5": "no idea"}  # none for 6


@pytest.fixture
def problems(tmp_path):
    write_scienceqa(tmp_path)
    return read_problems(tmp_path / "problems.json", tmp_path / "pid_splits.json", "test")[0]


def _predictions(texts: dict[str, str], prompt: str | None = None) -> dict[str, Prediction]:
    return {pid: Prediction(text, prompt) for pid, text in texts.items()}


def test_the_three_forms_of_a_file(tmp_path):
    wanted = _predictions(TEXTS)
    (tmp_path / "results.json").write_text(json.dumps({"acc": 1.0, "outputs": TEXTS, "results": {"1": 0}}, indent=2))
    assert read_predictions(tmp_path / "results.json") == wanted
    assert read_predictions(write_predictions(tmp_path / "ours.jsonl", TEXTS)) == wanted
    assert read_predictions(write_predictions(tmp_path / "one.jsonl", {"1": "A"})) == _predictions({"1": "A"})
    official = write_predictions(tmp_path / "official.jsonl", TEXTS, "question_id", prompt="<image>\nWhich?")
    assert read_predictions(official) == _predictions(TEXTS, "<image>\nWhich?")
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 7, "text": "A"}\r\n\r\n')
    assert read_predictions(tmp_path / "bom.jsonl") == _predictions({"7": "A"})
    (tmp_path / "line_separator.jsonl").write_text('{"id": "1", "text": "A\u2028B"}\n')
    assert read_predictions(tmp_path / "line_separator.jsonl") == _predictions({"1": "A\u2028B"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "f: holds no predictions; give JSONL"),
        ('{"outputs": {}}', "f: holds no predictions"),
        ('{"id": "1", "text": "A"}\n\n{"id": 1, "text": "B"}', "f:3: id '1' stands at .*f:1 too; keep one"),
        ('{"outputs": {"1": "A", "2": "A", "1": "B"}}', r"f outputs\['1'\]: id '1' stands at .*f outputs"),
        ('{"outputs": {"1": 3}}', r"f outputs\['1'\]: the answer must be text .*got 3"),
        ('{"id": "1", "text": "A"}\n{"id": "2", "text": null}', "f:2: the answer must be text"),
        ('{"id": "1"}', "f:1: the answer must be text"),
        ('{"text": "A"}', "f:1: has neither 'id' nor 'question_id'; give JSONL"),
        ('{"id": true, "text": "A"}', "f:1: 'id' must be a whole number or text, got True; give JSONL"),
        ('{"id": "1", "text": "A"}\n{', "f:2: not valid JSON"),
        ('["A"]', "f:1: expected an object, got list"),
        ('{"id": 1, "question_id": 2, "text": "A"}', "f:1: 'id' and 'question_id' differ"),
        ('{\n  "outputs": {\n    "1": "A",\n    "2"', "f: not valid JSON: .* line 4 column"),
        ("[" * 100_000, "f:1: not valid JSON"),
    ],
)
def test_a_bad_file_names_its_place(tmp_path, content, message):
    (tmp_path / "f").write_text(content)
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / "f")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="none: cannot be read .No such file"):
        read_predictions(tmp_path / "none")
    (tmp_path / "f").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="f: not UTF-8 text"):
        read_predictions(tmp_path / "f")


def test_every_number_of_a_summary(problems):
    summary = summarise(decide(_predictions(TEXTS), problems), problems)
    columns = summary.pop("by_column")
    assert summary == {
        "predictions": {"1": 0, "2": 1, "3": 2, "4": -1, "5": -1, "6": -1},
        "failed": 3,
        "failed_by_reason": dict.fromkeys(REASONS, 0) | {OUT_OF_RANGE: 1, NO_LETTER: 1, MISSING: 1},
        "accuracy": 50.0, "correct": 3, "total": 6,
    }  # fmt: skip
    counts = {"NAT": (2, 2), "SOC": (1, 2), "LAN": (0, 2), "TXT": (2, 2), "IMG": (2, 3), "NO": (0, 2),
              "G1-6": (2, 3), "G7-12": (1, 3)}  # fmt: skip
    assert columns == {
        name: {"accuracy": 100 * correct / total, "correct": correct, "total": total}
        for name, (correct, total) in counts.items()
    }
    assert table_row(summary | {"by_column": columns}) == [100 * c / t for c, t in counts.values()] + [50.0]


def test_the_official_image_column_is_what_the_prompts_say(problems):
    def image(predictions):
        answers = decide(predictions, problems, official=True)
        column = summarise(answers, official_images(predictions, problems))["by_column"]["IMG"]
        return column["correct"], column["total"]

    right = {"2": "The answer is B.", "3": "C. water"}
    assert image({**_predictions(right, "<image>\n?"), **_predictions({"1": "(A)"}, "?")}) == (2, 2)  # 6 is missing
    assert image(_predictions(right, "?")) == (0, 0)
    assert image(_predictions(right)) == (2, 2)  # the file does not say: the problems do


def test_a_column_without_problems_has_no_accuracy(problems):
    one = {"1": problems["1"]}
    summary = summarise(decide(_predictions({"1": "A"}), one), one)
    assert summary["by_column"]["SOC"] == {"accuracy": None, "correct": 0, "total": 0}
    assert format_table({"mine": table_row(summary)})[1].split() == "mine 100.00 - - 100.00 - - 100.00 - 100.00".split()


def test_without_problems_there_are_only_predictions():
    summary = summarise(decide(_predictions(TEXTS), None), None)
    assert summary["predictions"] == {"1": 0, "2": 1, "3": 2, "4": 3, "5": -1}
    assert set(summary) == {"predictions", "failed", "failed_by_reason"}


def test_predictions_for_another_split_are_refused(problems):
    with pytest.raises(DataError, match="none of the 1 predictions is for .* 6 problems.*ids 77, problems 1, 2, 3"):
        decide(_predictions({"77": "A"}), problems)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "art"}, "'subject' is 'art'; ScienceQA has natural science, social"),
        ({"grade": "grade13"}, "'grade' is 'grade13'"),
        ({"grade": 3}, "'grade' must be a text"),
        ({"hint": None}, "'hint' must be a text"),
        ({"answer": 3}, "'answer' is 3"),
        ({"choices": []}, "0 choices"),
    ],
)
def test_problems_that_cannot_be_scored_are_counted_and_named(tmp_path, changes, message):
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS | {"2": problem(0) | changes, "9": problem(7)}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "2", "9"]}))
    with pytest.raises(DataError, match=rf"2 problem\(s\) of split 'test'(.|\n)*problems.json\['2'\]: .*{message}"):
        read_problems(tmp_path / "problems.json", tmp_path / "pid_splits.json", "test")


def test_a_split_that_is_not_there(tmp_path):
    write_scienceqa(tmp_path)
    with pytest.raises(ConfigError, match="no split 'val'; it holds train, test"):
        read_problems(tmp_path / "problems.json", tmp_path / "pid_splits.json", "val")
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "8", "9"]}))
    with pytest.raises(DataError, match="lacks 2 of the 3 problems of 'test' in .*: 8, 9"):
        read_problems(tmp_path / "problems.json", tmp_path / "pid_splits.json", "test")


def test_published_rows_have_all_columns_and_an_average_between_them():
    for row in PAPER_ROWS.values():
        assert len(row) == len(COLUMNS) + 1
        for group in (row[:3], row[6:8]):  # subjects and grades share out all problems
            assert min(group) < row[-1] < max(group)


NO = Answer(-1, NO_LETTER)
FIRST = {"both": Answer(0), "differ": Answer(0), "lost": Answer(0), "first": Answer(0), "second": NO, "none": NO}
SECOND = {"both": Answer(0), "differ": Answer(1), "lost": Answer(1), "first": NO, "second": Answer(1), "none": NO}


@pytest.mark.parametrize(
    ("fault", "max_total_tokens", "problem", "is_final"),
    [("http_400", None, "refused: http_400", True), ("empty_reply", None, "rejected: no text, ended by 'length'", True),
     ("http_400", 0, "budget", False)],
)
def test_requests_without_a_reply_are_named_with_what_to_do(tmp_path, fault, max_total_tokens, problem, is_final):
    requests = [ChatRequest(str(number), "m", (Message("user", f"{number}?"),), 1) for number in range(5)]
    budget = Budget(max_total_tokens=max_total_tokens)
    with fault_proxy(lambda body: "A", fault_frac=1, faults=[fault]) as proxy:
        with ChatClient(Endpoint(proxy.base_url), ReplyCache(tmp_path), budget, Limits(), RetryPolicy()) as client:
            with pytest.raises(BackendUnavailableError) as raised:
                ask_all(client, requests)
    head, what, advice = str(raised.value).splitlines()
    assert head == "5 of 5 requests have no reply:"
    assert what.startswith(f"  {problem}") and what.endswith(" (5, the first: 0, 1, 2)")
    assert ("refused again" in advice, "Run the same command again" in advice) == (is_final, not is_final)


def test_an_empty_reply_that_ended_by_itself_is_an_answer(tmp_path):
    requests = [ChatRequest("1", "m", (Message("user", "?"),), 1)]
    with fault_proxy(lambda body: "") as proxy:
        with ChatClient(Endpoint(proxy.base_url), ReplyCache(tmp_path), Budget(), Limits(), RetryPolicy()) as client:
            assert [reply.text for reply in ask_all(client, requests)] == [""]


def test_complement_takes_the_first_where_the_second_has_no_answer():
    assert [answer.index for answer in complement(FIRST, SECOND).values()] == [0, 1, 1, 0, 1, -1]


def test_the_judge_is_asked_where_two_answers_differ():
    assert to_judge(FIRST, SECOND) == ["differ", "lost"]
    judged = judge(FIRST, SECOND, {"differ": Answer(2), "lost": NO})
    assert [answer.index for answer in judged.values()] == [0, 2, 0, 0, 1, -1]
    assert count_cases(FIRST, SECOND) == {"agree": 1, "differ": 2, "only_first": 1, "only_second": 1, "none": 1}
