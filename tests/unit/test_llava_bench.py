"""Benchmark files joined by question id, the judge's prompt, and what is planned, before anything is paid."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_ds.errors import ConfigError, DataError
from llava_ds.evaluation import exact_match, llava_bench_questions
from llava_ds.evaluation.judge import Plan, plan_requests
from llava_ds.evaluation.judge_prompts import ORDERS, JudgeSettings, load_rule
from llava_ds.evaluation.llava_bench import Bench, read_bench
from tests.helpers.bench import CATEGORIES, read_rows, shared_coco, shuffle, write_answers, write_bench, write_rows

OFFICIAL_KEYS = ["conv", "detail", "complex", "llava_bench_conv", "llava_bench_detail", "llava_bench_complex"]
PLAN = Plan(ORDERS, repeats=2, seed=0, max_attempts=3)


def _read(files) -> Bench:
    models = [path for name, path in files.items() if name not in ("questions", "references", "context")]
    return read_bench(files["questions"], files["references"], files["context"], models)


def _official_rule(folder: Path) -> Path:
    path = folder / "rule.json"
    rules = {key: {"role": "Assistant", "prompt": f"Rate for {key}.\n1-10 \n"} for key in ["default", *OFFICIAL_KEYS]}
    path.write_text(json.dumps(rules))
    return path


def test_joined_by_id_in_any_order(tmp_path):
    files = write_bench(tmp_path, 12, models=("ours", "theirs"))
    bench = _read(files)
    assert [question.id for question in bench.questions] == [str(id) for id in range(12)]  # by number, not by text
    assert [(answers.name, answers.model) for answers in bench.answers] == [("ours", "ours"), ("theirs", "theirs")]
    assert bench.questions[4].reference == "A dog, number 4." and bench.answers[1].texts["4"] == "theirs says 4"
    for number, path in enumerate(files.values()):
        shuffle(path, number)
    assert [answers.texts for answers in _read(files).answers] == [answers.texts for answers in bench.answers]
    assert _read(files).questions == bench.questions


def test_all_problems_at_once_with_ids_and_files(tmp_path):
    files = write_bench(tmp_path, 9)
    answers = read_rows(files["ours"])
    changed = [answers[0], answers[0], *answers[3:], answers[8] | {"question_id": 77}]
    changed[3] = changed[3] | {"category": "complex", "prompt": "Another question"}
    write_rows(files["ours"], changed)
    write_rows(files["references"], read_rows(files["references"])[1:])
    write_rows(files["context"], read_rows(files["context"])[1:])
    with pytest.raises(DataError) as raised:
        _read(files)
    message = str(raised.value)
    for part in (
        "references.jsonl lacks 1 of the 9 question ids of", "question_id 0 stands also in", "ours.jsonl:1\n",
        "ours.jsonl lacks 2 of the 9 question ids of", ": 1, 2\n", "ours.jsonl has 1 question id(s) that", ": 77\n",
        "ours.jsonl:4: category 'complex', but", "answers 'Another question'", "no context for 1 image(s)", "0.jpg",
    ):
        assert part in message, (part, message)


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("ours", {"text": None}, "'text' must be text"),
        ("references", {"text": " "}, "'text' must be text with words"),
        ("questions", {"category": None}, "'category' must be text"),
        ("questions", {"question_id": True}, "'question_id' must be a whole number or text, got True"),
        ("context", {"captions": None}, "expected image, captions, instances"),
        ("context", {"captions": [1]}, "expected image, captions, instances"),
        ("context", {"instances": [{}]}, "expected image, captions, instances"),
        ("context", {"image": ["0.jpg"]}, "expected image, captions, instances"),
        ("context", {"image": "1.jpg"}, "1.jpg stands there a second time"),
        ("ours", {"model": "other"}, "answers of several models, other, ours"),
    ],
)
def test_bad_rows(tmp_path, name, change, part):
    files = write_bench(tmp_path)
    rows = read_rows(files[name])
    write_rows(files[name], [rows[0] | change, *rows[1:]])
    with pytest.raises(DataError, match="jsonl") as raised:
        _read(files)
    assert part in str(raised.value)


def test_bad_files(tmp_path):
    files = write_bench(tmp_path)
    cases = {None: "no such file", "\n\n": "no records", "[]\n": "expected an object", "{": "not valid JSON"}
    for content, part in cases.items():
        path = tmp_path / "bad.jsonl"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=part):
            _read(files | {"ours": path})
    other = write_answers(tmp_path / "elsewhere" / "ours.jsonl", read_rows(files["questions"]), "other")
    with pytest.raises(DataError, match="all must differ"):
        _read(files | {"again": other})
    mixed = [*read_rows(files["context"]), {"image": "a.jpg", "caption": "A dog."}]
    with pytest.raises(DataError, match="mixes contexts"):
        _read(files | {"context": write_rows(tmp_path / "mixed.jsonl", mixed)})


@pytest.mark.parametrize("name", ["questions", "references", "context", "ours"])
def test_half_a_surrogate_pair_is_refused_before_it_is_paid(tmp_path, name):
    files = write_bench(tmp_path)
    rows = read_rows(files[name])
    write_rows(files[name], [rows[0], rows[1] | {"captions" if name == "context" else "text": "half \ud83d"}])
    with pytest.raises(DataError, match=f"{files[name].name}:2: not Unicode text"):
        _read(files)


@pytest.mark.parametrize("id", [None, True, 1.5, [1]])
def test_what_is_no_question_id_is_none_anywhere(tmp_path, id):
    """The questions that a model is asked, LLaVA-Bench's and those of exact match, read ids as the judge does."""
    row = {"id": id, "question_id": id, "image": "0.jpg", "text": "?", "kind": "k", "question": "?", "answer": "a"}
    bench, listed = write_rows(tmp_path / "q.jsonl", [row]), tmp_path / "q.json"
    listed.write_text(json.dumps([row]))
    with pytest.raises(DataError, match="q.jsonl:1: 'question_id' must be a whole number or text, got"):
        llava_bench_questions.read_questions(bench)
    with pytest.raises(DataError, match=r"q.json\[0\]: 'id' must be a whole number or text, got"):
        exact_match.read_questions(listed)


def test_official_answers_and_empty_ones(tmp_path):
    files = write_bench(tmp_path)
    rows = [{"question_id": id, "prompt": f"What is it? ({id})", "text": "" if id else "Yes.", "answer_id": "x",
             "model_id": "llava-13b", "metadata": {}} for id in range(6)]
    answers = _read({**files, "ours": write_rows(tmp_path / "llava.jsonl", rows)}).answers[0]
    assert (answers.name, answers.model, answers.num_empty) == ("llava", "llava-13b", 5)


@pytest.mark.parametrize("order", ORDERS)
def test_the_official_prompt(tmp_path, order):
    """Written out by hand from the official scripts' f-strings."""
    rule = load_rule(_official_rule(tmp_path))
    first, second = ("A dog, number 1.", "ours says 1")[:: 1 if order == "reference_first" else -1]
    answers = f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n"
    expected = {
        "coco": "[Context]\nA dog 0.\nA dog.\n\ndog: [0.1, 0.25, 0.5, 1.0]\ncat: [0, 0, 1, 1]\n\n"
                f"[Question]\nWhat is it? (1)\n\n{answers}[System]\nRate for detail.\n1-10 \n\n\n",
        "in_the_wild": "[Context]\nA dog 0, at length.\n\n[Question]\nWhat is it? (1)"
                       f"\n\n{answers}[System]\nRate for llava_bench_detail.\n1-10 \n\n\n",
    }
    for kind, content in expected.items():
        bench = _read(write_bench(tmp_path / kind, kind=kind))
        assert bench.kind == kind
        assert rule.content(kind, bench.questions[1], bench.answers[0].texts["1"], order) == content


def test_captions_in_the_wild_may_be_a_list(tmp_path):
    files = write_bench(tmp_path, 3, kind="in_the_wild")
    write_rows(files["context"], [{"image": "0.jpg", "caption": ["One.", "Two."]}])
    assert _read(files).questions[0].context == "One.\nTwo."


def test_official_settings_go_with_an_official_rule(tmp_path):
    rule = load_rule(_official_rule(tmp_path))
    bench = _read(write_bench(tmp_path))
    plan = Plan(rule.settings.orders, repeats=1, seed=5, max_attempts=3)
    planned = plan_requests(bench, rule, plan, "gpt-4-0314", {})
    assert [slot.order for slot, _ in planned] == ["reference_first"] * 6 and not rule.is_own
    bodies = [request.body() for _, request in planned]
    assert bodies[0] == {
        "model": "gpt-4-0314", "temperature": 0.2, "max_tokens": 1024, "top_p": 1.0,
        "messages": [
            {"role": "system",
             "content": "You are a helpful and precise assistant for checking the quality of the answer."},
            {"role": "user", "content": rule.content("coco", bench.questions[0], "ours says 0", "reference_first")},
        ],
    }


def test_our_rule_names_every_kind_of_question_in_other_words(tmp_path):
    rule = load_rule()
    assert sorted(rule.prompts) == sorted(OFFICIAL_KEYS) and rule.is_own
    assert rule.orders(None) == rule.orders("both") == ORDERS and rule.settings.send_seed
    assert rule.orders("candidate_first") == ("candidate_first",)
    for kind in ("coco", "in_the_wild"):
        prompts = {rule.prompt(kind, category)["prompt"] for category in CATEGORIES}
        assert len(prompts) == 1 and "request your feedback" not in prompts.pop()
    copy = tmp_path / "copy.yaml"
    copy.write_bytes(rule.path.read_bytes())
    edited = load_rule(copy)
    assert edited == replace(rule, path=copy, is_own=False)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[", "cannot be read"), ("[]", "expected rules by kind"), ("{}", "no kind"),
        ("conv: {role: A}", r"\['conv'\]"),
        ("3: {role: A, prompt: B}", r"\['3'\]"),
    ],
)
def test_bad_rules(tmp_path, text, part):
    path = tmp_path / "rule.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_rule(path)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ("temprature: 1", "temprature: unknown key; did you mean 'temperature'"),
        ("orders: [both]", "orders.0: Input should be 'reference_first' or 'candidate_first', got 'both'"),
        ("orders: [[a]]", "orders.0: Input should be"), ("orders: 3", "orders: Input should be a valid tuple, got 3"),
        ("orders: []", "orders: Value error, name one or both"),
        ("orders: [reference_first, reference_first]", "orders: Value error, name one or both of .*, each once"),
        ("temperature: hot", "temperature: Input should be a valid number"), ("temperature: -1", "temperature: "),
        ("temperature: .nan", "temperature: Input should be a finite number"),
        ("max_tokens: null", "max_tokens: Input should be a valid integer"), ("max_tokens: 0", "max_tokens: "),
        ("system: null", "system: Input should be a valid string"), ("send_seed: maybe", "send_seed: "),
    ],
)
def test_bad_settings_of_a_rule(tmp_path, settings, part):
    path = tmp_path / "rule.yaml"
    path.write_text(f"judge: {{{settings}}}\nconv: {{role: A, prompt: B}}")
    with pytest.raises(ConfigError, match=f"rule.yaml, judge: 1 problem.s.:\n  {part}"):
        load_rule(path)


def test_a_rule_says_all_that_is_wrong_and_is_unicode(tmp_path):
    path = tmp_path / "rule.yaml"
    path.write_text("judge: {temperature: hot, system: 3}")
    with pytest.raises(ConfigError, match=r"judge: 2 problem\(s\):\n  system: .*, got 3\n  temperature: .*, got 'hot'"):
        load_rule(path)
    path.write_text('conv: {role: A, prompt: "half \\ud83d"}')
    with pytest.raises(DataError, match="rule.yaml: not Unicode text"):
        load_rule(path)


def test_settings_of_a_rule(tmp_path):
    path = tmp_path / "rule.yaml"
    path.write_text('judge: {temperature: null, send_seed: "no"}\n'
                    + "".join(f"{name}: {{role: A, prompt: B}}\n" for name in CATEGORIES))
    rule = load_rule(path)
    assert rule.settings == JudgeSettings(temperature=None) and rule.settings.send_seed is False
    bench = _read(write_bench(tmp_path))
    sent = [plan_requests(bench, rule, PLAN, "judge", extra)[0][1].body() for extra in ({}, {"temperature": 1})]
    assert "temperature" not in sent[0] and sent[1]["temperature"] == 1


def test_a_kind_of_question_without_a_rule_is_said_before_anything_is_asked(tmp_path):
    path = tmp_path / "rule.yaml"
    path.write_text("conv: {role: A, prompt: B}")
    with pytest.raises(ConfigError, match="no rule for complex, detail; it has conv"):
        plan_requests(_read(write_bench(tmp_path)), load_rule(path), PLAN, "judge", {})


def test_each_judgement_is_planned_once_and_equal_answers_share_one(tmp_path):
    files = write_bench(tmp_path, 9, models=("ours", "theirs"))
    planned = plan_requests(_read(files), load_rule(), PLAN, "judge", {"grammar": "g"})
    assert len(planned) == len({slot for slot, _ in planned}) == len({slot.request_id for slot, _ in planned}) == 72
    assert len({request.key() for _, request in planned}) == 72
    seeds = {request.body()["seed"] for _, request in planned}
    assert len(seeds) == 36 and max(seeds) < 2**31  # of question, order and repeat; models do not matter
    assert all(request.body()["grammar"] == "g" for _, request in planned)
    rows = read_rows(files["theirs"])
    write_rows(files["theirs"], [rows[0] | {"text": "ours says 0"}, *rows[1:]])
    planned = plan_requests(_read(files), load_rule(), PLAN, "judge", {})
    assert len({request.key() for _, request in planned}) == 68


def test_repeats_differ_where_no_seed_is_sent(tmp_path):
    rule = load_rule(_official_rule(tmp_path))
    planned = plan_requests(_read(write_bench(tmp_path)), rule, PLAN, "judge", {})
    assert len({request.key() for _, request in planned}) == 24
    assert not any("seed" in request.body() for _, request in planned)


def test_the_shared_questions(tmp_path):
    files = shared_coco()
    answers = write_answers(tmp_path / "ours.jsonl", read_rows(files["questions"]), "ours")
    bench = read_bench(files["questions"], files["references"], files["context"], [answers])
    assert [question.id for question in bench.questions] == [str(id) for id in range(90)]
    assert [sum(question.category == name for question in bench.questions) for name in CATEGORIES] == [30, 30, 30]
    context = bench.questions[0].context.split("\n")
    assert len(context) > 6 and context[5] == "" and context[6].endswith("]")
