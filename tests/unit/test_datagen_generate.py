"""Generation against a server on loopback: exact files, whatever the order, and nothing paid twice."""

import json
from functools import partial
from pathlib import Path

import pytest

from llava_ds.api.budget import Budget, Prices
from llava_ds.api.cache import ReplyCache
from llava_ds.api.client import ChatClient
from llava_ds.api.endpoint import Endpoint
from llava_ds.api.limits import Limits
from llava_ds.api.retries import RetryPolicy
from llava_ds.data.sources.llava_json import open_llava_json
from llava_ds.datagen.generate import generate
from llava_ds.datagen.kinds import KINDS
from llava_ds.datagen.plan import PAPER_MIX, plan_samples
from llava_ds.datagen.prompt_files import OUR_PROMPTS, load_prompts
from llava_ds.datagen.records import Records
from llava_ds.datagen.requests import GenerationSettings, build_request
from llava_ds.datagen.results import result_of
from llava_ds.datagen.summary import summarize_report
from llava_ds.errors import ConfigError
from llava_ds.text.instructions import DETAILED_INSTRUCTIONS, draw_instruction
from tests.helpers.commands import invoke
from tests.helpers.data_writer import kind_of, make_images, words_of, write_reply
from tests.helpers.fault_proxy import body_hash, chat_reply, fault_proxy, response_id

IMAGES = make_images(10)
RECORDS = Records(IMAGES, "abc")
PROMPTS = load_prompts(OUR_PROMPTS, KINDS)
SETTINGS = GenerationSettings("m", num_samples=16, seed=5, max_attempts=2)
PRICES = Prices(1.0, 2.0)
FILES = ("data.json", "provenance.jsonl", "rejects.jsonl")


def run(out: Path, base_url: str, settings=SETTINGS, records=RECORDS, prompts=PROMPTS, concurrency=4,
        prices=PRICES, **budget):
    client = ChatClient(
        Endpoint(base_url, timeout_s=10), ReplyCache(out / "cache", log=lambda _: None),
        Budget(prices, **budget), Limits(concurrency), RetryPolicy(first_wait_s=0.01), lambda _: None,
    )
    with client:
        return generate(records, settings, prompts, client, out)


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def bad_for(*kinds: str, always: bool = False):
    """Replies that are refused at the first attempt (or at all) where the kind is one of these."""
    seen: set[str] = set()

    def answer(body: dict) -> str:
        text = json.dumps(body["messages"])
        is_first = text not in seen
        seen.add(text)
        return "The caption says so." if kind_of(body) in kinds and (always or is_first) else write_reply(body)

    return answer


def test_files_are_exact(tmp_path):
    with fault_proxy(write_reply) as proxy:
        report = run(tmp_path / "out", proxy.base_url)
    planned = plan_samples(IMAGES, PAPER_MIX, 16, 5)
    records = json.loads((tmp_path / "out" / "data.json").read_text())
    lines = read_lines(tmp_path / "out" / "provenance.jsonl")
    assert [record["id"] for record in records] == [sample.id for sample in planned] == [line["id"] for line in lines]
    assert len(planned) == 16
    for sample, record, line in zip(planned, records, lines, strict=True):
        request = build_request(sample, PROMPTS[sample.kind.name], SETTINGS)
        turns = [turn["value"] for turn in record["conversations"]]
        assert record["image"] == sample.image.image
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0].startswith("<image>\n") and "<image>" not in "".join(turns)[1:].removeprefix("image>")
        assert len(turns) == (4 if sample.kind.name == "conversation" else 2)
        assert words_of(request.body(), 12) in turns[1]
        if sample.kind.name == "detail":
            assert turns == [
                f"<image>\n{draw_instruction(DETAILED_INSTRUCTIONS, 5, sample.id)}", write_reply(request.body())
            ]
        assert line | {"prompt_tokens": 35} == line and line["completion_tokens"] > 30
        assert "cost_usd" not in line  # the file is not a function of prices
        assert (line["request_key"], line["attempt"], line["model"]) == (request.key(), 0, "m")
        assert line["response_ids"] == [response_id(body_hash(request.body()))]
        assert line["prompt_sha256"] == PROMPTS[sample.kind.name].sha256
    assert (tmp_path / "out" / "rejects.jsonl").read_text() == ""
    assert (tmp_path / "out" / "COMPLETE").is_file()
    assert len(list(open_llava_json(tmp_path / "out" / "data.json", tmp_path))) == 16
    assert report["planned"] == report["produced"] == {"conversation": 6, "detail": 2, "complex": 8}
    assert (report["is_complete"], report["prompt_tokens"], report["open"]) == (True, 16 * 35, {})
    assert report["completion_tokens"] == sum(line["completion_tokens"] for line in lines)
    assert report["cost_usd"] == pytest.approx((16 * 35 + 2 * report["completion_tokens"]) / 1e6)
    assert report["runs"][0]["prices"] == {"prompt_usd_per_million": 1.0, "completion_usd_per_million": 2.0}


def test_what_is_sent():
    sample = next(sample for sample in plan_samples(IMAGES, PAPER_MIX, 16, 5) if sample.image.id == "0001")
    settings = GenerationSettings("m", seed=5, max_tokens=7, reply_grammar=True, extra_body={"top_k": 3})
    body = build_request(sample, PROMPTS[sample.kind.name], settings).body()
    assert body["messages"][-1]["content"].startswith("Picture 1.\nA thing.")
    assert ("thing: [0.100, 0.200, 0.300, 0.500]" in body["messages"][-1]["content"]) == sample.kind.sees_boxes
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_k"]) == ("m", 7, 0.7, 3)
    assert body["grammar"].startswith("root ::= ")
    planned = plan_samples(IMAGES, PAPER_MIX, 16, 5)
    bodies = [build_request(sample, PROMPTS[sample.kind.name], SETTINGS).body() for sample in planned]
    assert len({body["seed"] for body in bodies}) == 16 and "grammar" not in bodies[0]


def test_the_same_files_whatever_the_order(tmp_path):
    answer = bad_for("detail")
    with fault_proxy(answer) as proxy:
        run(tmp_path / "a", proxy.base_url, concurrency=1)
    with fault_proxy(bad_for("detail"), fault_frac=0.3, faults=("http_500", "connection", "http_429")) as proxy:
        run(tmp_path / "b", proxy.base_url, concurrency=8)
        assert proxy.totals().total() > 20
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_refused_replies_are_asked_again_and_kept(tmp_path):
    with fault_proxy(bad_for("detail", "complex")) as proxy:
        report = run(tmp_path, proxy.base_url)
        assert proxy.totals() == {"good": 26}
    assert report["produced"] == report["planned"] and report["is_complete"]
    assert report["refused_replies"] == {"wrong form": 8, "speaks of captions or boxes": 2}
    rejects = read_lines(tmp_path / "rejects.jsonl")
    assert len(rejects) == 10 and all(line["produced"] and line["problem"] is None for line in rejects)
    assert {reply["text"] for line in rejects for reply in line["replies"]} == {"The caption says so."}
    by_id = {line["id"]: line for line in read_lines(tmp_path / "provenance.jsonl")}
    for line in rejects:
        assert by_id[line["id"]]["attempt"] == 1 and line["replies"][0]["attempt"] == 0
        assert by_id[line["id"]]["prompt_tokens"] == 70
        assert by_id[line["id"]]["response_ids"][0] == line["replies"][0]["response_id"]
        assert by_id[line["id"]]["request_key"] != line["replies"][0]["request_key"]


@pytest.mark.parametrize(
    ("added", "reason"),
    [(" It is 0.2 or 0.20 wide.", "gives coordinates"), (" Half \ud83d.", "holds a character that is no text")],
)
def test_replies_with_an_edge_of_the_image_or_half_a_character(tmp_path, added, reason):
    """Image 1 has a box with an edge of 0.2; the file of what was refused can hold what UTF-8 cannot."""
    records, seen = Records(IMAGES[1:2], "abc"), []

    def answer(body: dict) -> str:
        seen.append(body)
        return write_reply(body) + (added if len(seen) == 1 else "")

    with fault_proxy(answer) as proxy:
        report = run(tmp_path, proxy.base_url, GenerationSettings("m", {"detail": 1}, max_attempts=2), records)
    assert report["refused_replies"] == {reason: 1} and report["is_complete"] and len(seen) == 2
    (line,) = read_lines(tmp_path / "rejects.jsonl")
    assert line["replies"][0]["text"].endswith(added) and line["produced"]


def test_samples_that_stay_bad(tmp_path):
    with fault_proxy(bad_for("detail", always=True)) as proxy:
        report = run(tmp_path, proxy.base_url)
        assert proxy.totals() == {"good": 18}
    assert report["rejected"] == {"conversation": 0, "detail": 2, "complex": 0} and report["is_complete"]
    rejects = read_lines(tmp_path / "rejects.jsonl")
    assert [(line["produced"], len(line["replies"])) for line in rejects] == [(False, 2), (False, 2)]
    assert all(line["problem"].startswith("rejected: speaks of captions or boxes") for line in rejects)
    written = [record["id"] for record in json.loads((tmp_path / "data.json").read_text())]
    assert sorted(written + [line["id"] for line in rejects]) == sorted(
        sample.id for sample in plan_samples(IMAGES, PAPER_MIX, 16, 5)
    )


def test_nothing_good_is_said(tmp_path):
    with fault_proxy(lambda body: "The caption says so.") as proxy:
        report = run(tmp_path, proxy.base_url, prices=Prices())
    said = summarize_report(report, tmp_path)
    assert report["is_complete"] and "No sample is good" in said
    assert f"this run paid for 32 calls: 1120 + {32 * 4} tokens, no prices given\n" in said


def test_what_is_not_known_is_said(tmp_path):
    def answer(body: dict) -> dict:
        return {name: value for name, value in chat_reply(write_reply(body), "m").items() if name != "usage"}

    with fault_proxy(answer, fault_frac=1, faults=("http_504",), max_faults=1) as proxy:
        report = run(tmp_path, proxy.base_url)
    said = summarize_report(report, tmp_path)
    assert " (estimated for 16 without token counts, which caps take at their worst), and at most " in said
    assert "for 16 lost calls" in said and report["spent"]["max_lost_cost_usd"] > report["spent"]["cost_usd"] > 0


def test_replies_without_text_are_refused_and_paid_once(tmp_path):
    with fault_proxy(write_reply, fault_frac=1, faults=("empty_reply",)) as proxy:
        for num_paid in (32, 0):
            report = run(tmp_path, proxy.base_url)
            assert report["refused_replies"] == {"cut off": 32} and report["num_open"] == 0
            assert (report["runs"][-1]["paid_calls"], report["runs"][-1]["faults"]) == (num_paid, {})


def test_the_same_text_twice(tmp_path):
    def answer(body: dict) -> str:
        return write_reply(body | {"messages": body["messages"][:1], "seed": 0})  # one text for a kind

    with fault_proxy(answer) as proxy:
        report = run(tmp_path, proxy.base_url)
    assert report["produced"] == {"conversation": 1, "detail": 1, "complex": 1}
    assert report["refused_replies"] == {"the same text as another sample": 13}
    first = json.loads((tmp_path / "data.json").read_text())[0]["id"]
    assert first == plan_samples(IMAGES, PAPER_MIX, 16, 5)[0].id
    assert len(read_lines(tmp_path / "rejects.jsonl")) == 13


def test_a_spent_budget_is_told_and_gone_on_from(tmp_path):
    with fault_proxy(write_reply) as proxy:
        report = run(tmp_path, proxy.base_url, max_total_tokens=6000, concurrency=1)
        num_first = proxy.totals()["good"]
        assert 0 < num_first < 16 and not report["is_complete"]
        assert report["num_open"] == 16 - num_first
        assert report["open"] == {"budget": {"count": 16 - num_first, "example": "budget"}}
        assert len(json.loads((tmp_path / "data.json").read_text())) == num_first
        assert not (tmp_path / "COMPLETE").exists()
        assert read_lines(tmp_path / "rejects.jsonl") == []
        report = run(tmp_path, proxy.base_url)
        assert report["is_complete"] and report["produced"] == report["planned"]
        assert [run["paid_calls"] for run in report["runs"]] == [num_first, 16 - num_first]
        assert report["spent"]["prompt_tokens"] == 16 * 35
        assert report["spent"]["cost_usd"] == pytest.approx(report["cost_usd"])
        assert proxy.totals() == {"good": 16} and not proxy.paid_twice()
        assert (tmp_path / "COMPLETE").exists()


def test_a_request_that_the_endpoint_refuses_stays_open(tmp_path):
    with fault_proxy(write_reply, fault_frac=1.0, faults=("http_400",)) as proxy:
        report = run(tmp_path, proxy.base_url)
    assert not report["is_complete"] and report["produced"] == dict.fromkeys(KINDS, 0)
    assert report["num_open"] == report["open"]["refused: http_400"]["count"] == 16 and len(report["open"]) == 1
    assert "made to fail with http_400" in report["open"]["refused: http_400"]["example"]
    assert json.loads((tmp_path / "data.json").read_text()) == []
    assert len(read_lines(tmp_path / "rejects.jsonl")) == 16


def test_a_second_run(tmp_path):
    with fault_proxy(write_reply) as proxy:
        run(tmp_path, proxy.base_url)
        before = [(tmp_path / name).read_bytes() for name in FILES]
        free = run(tmp_path, proxy.base_url, prices=Prices())
        assert [(tmp_path / name).read_bytes() for name in FILES] == before
        assert free["cost_usd"] is None and free["runs"][1]["cost_usd"] == 0.0  # it paid nothing, whatever the price
        assert free["spent"]["cost_usd"] == free["runs"][0]["cost_usd"] > 0
        more = run(tmp_path, proxy.base_url, GenerationSettings("m", num_samples=19, seed=5, max_attempts=3))
        assert proxy.totals()["good"] == 19 and not proxy.paid_twice()
    assert sum(more["produced"].values()) == 19
    ids = [record["id"] for record in json.loads((tmp_path / "data.json").read_text())]
    assert ids == [sample.id for sample in plan_samples(IMAGES, PAPER_MIX, 19, 5)]


def test_what_faults_cost_is_not_forgotten(tmp_path):
    with fault_proxy(write_reply, fault_frac=1, faults=("wrong_model",), max_faults=1) as proxy:
        first = run(tmp_path, proxy.base_url)
        report = run(tmp_path, proxy.base_url)
    assert [run["paid_calls"] for run in report["runs"]] == [32, 0]
    assert report["runs"][0] == first["runs"][0] and report["spent"] == first["spent"]
    assert report["prompt_tokens"] == 16 * 35 and report["spent"]["prompt_tokens"] == 32 * 35
    (tmp_path / "report.json").write_text('{"runs": [{}]}')
    with pytest.raises(ConfigError, match=r"report.json cannot be read .*without what earlier runs paid"):
        run(tmp_path, "http://127.0.0.1:9/v1")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_a_run_that_ends_early_leaves_what_it_paid(tmp_path, monkeypatch, error):
    asked = []

    def result_of_three(sample, outcome):
        asked.append(sample.id)
        if len(asked) == 3:
            raise error
        return result_of(sample, outcome)

    with fault_proxy(write_reply) as proxy:
        before = run(tmp_path, proxy.base_url, GenerationSettings("m", num_samples=10, seed=5, max_attempts=2))
        monkeypatch.setattr("llava_ds.datagen.generate.result_of", result_of_three)
        with pytest.raises(error):
            run(tmp_path, proxy.base_url)
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["is_complete"] and not (tmp_path / "COMPLETE").exists()
    assert len(report["runs"]) == 2 and report["runs"][0] == before["runs"][0]
    assert report["spent"]["calls"] == 10 + report["runs"][1]["calls"]


def test_a_body_that_no_request_may_have_binds_no_folder(tmp_path):
    settings = GenerationSettings("m", extra_body={"max_tokens": None})
    with pytest.raises(ConfigError, match="needs max_tokens"):
        run(tmp_path, "http://127.0.0.1:9/v1", settings)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_a_run_with_other_settings_is_refused(tmp_path):
    changed = GenerationSettings("other", num_samples=10, seed=6, max_attempts=2, temperature=0.1)
    with fault_proxy(write_reply) as proxy:
        run(tmp_path, proxy.base_url)
        before = (tmp_path / "data.json").read_bytes()
        with pytest.raises(ConfigError) as raised:
            run(tmp_path, proxy.base_url, changed, Records(IMAGES, "xyz"))
    for words in ("model: 'm' then, 'other' now", "num_samples: 16 then, 10 now", "seed: 5 then, 6 now",
                  "temperature: 0.7 then, 0.1 now", "records_sha256: 'abc' then, 'xyz' now"):
        assert words in str(raised.value)
    assert "prompts" not in str(raised.value)
    assert (tmp_path / "data.json").read_bytes() == before and (tmp_path / "COMPLETE").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with fault_proxy(write_reply) as proxy, pytest.raises(ConfigError, match="holds something else .mine.txt"):
        run(tmp_path, proxy.base_url)
    assert proxy.totals().total() == 0


@pytest.fixture
def generate_data():
    """The command."""
    return partial(invoke, "generate_data")


@pytest.fixture
def scenes(tmp_path):
    path = tmp_path / "scenes.jsonl"
    lines = [{"id": i.id, "image": i.image, "captions": i.captions} for i in IMAGES]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command(generate_data, scenes, tmp_path):
    out = tmp_path / "out"
    with fault_proxy(write_reply) as proxy:
        local = ("--model", "m", "--base-url", proxy.base_url)
        dry = generate_data(scenes, out, *local, "--dry-run", "--price-in", 1, "--price-out", 2)
        assert dry.exit_code == 0, dry.output
        assert "all: 20 calls, 0 of them in the cache" in dry.output and "conversation: 7 calls" in dry.output
        assert not out.exists() and proxy.totals().total() == 0
        done = generate_data(scenes, out, *local, "--kind", "detail", "--num-samples", 3)
        assert done.exit_code == 0, done.output
        assert "detail: 3 of 3 samples, 0 rejected" in done.output
        capped = generate_data(scenes, tmp_path / "capped", *local, "--max-total-tokens", 1)
        assert capped.exit_code == 1 and "no answer for 20 samples: budget" in capped.output
        assert "without paying twice" in capped.output
        other = generate_data(scenes, out, *local, "--kind", "complex", "--num-samples", 3)
        assert other.exit_code == 1 and "ConfigError" in other.output and "mix" in other.output
        assert proxy.totals() == {"good": 3}
    assert {record["id"][5:] for record in json.loads((out / "data.json").read_text())} == {"detail"}


def test_what_the_command_cannot_use_stays_as_it_is(generate_data, scenes, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    (foreign / ".DS_Store").write_text("")
    local = ("--model", "m", "--base-url", "http://127.0.0.1:9/v1")
    done = generate_data(scenes, foreign, *local)
    assert done.exit_code == 1 and "holds something else (thesis.tex)" in done.output
    assert sorted(file.name for file in foreign.iterdir()) == [".DS_Store", "thesis.tex"]
    done = generate_data(scenes, scenes / "out", *local)
    assert done.exit_code == 1 and "NotADirectoryError" in done.output and isinstance(done.exception, SystemExit)


def test_a_first_file_that_was_cut_off_is_no_obstacle(generate_data, scenes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".provenance.json").write_text("{")
    with fault_proxy(write_reply) as proxy:
        done = generate_data(scenes, out, "--model", "m", "--base-url", proxy.base_url, "--kind", "detail")
    assert done.exit_code == 0, done.output
    assert (out / "COMPLETE").is_file() and not (out / ".provenance.json").exists()


def test_nothing_that_could_be_used_is_no_success(generate_data, scenes, tmp_path):
    with fault_proxy(lambda body: "The caption says so.") as proxy:
        done = generate_data(scenes, tmp_path / "out", "--model", "m", "--base-url", proxy.base_url, "--kind", "detail")
    assert done.exit_code == 1 and "detail: 0 of 10 samples, 10 rejected" in done.output


def test_the_command_of_naive_pairs(generate_data, tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,caption\na.jpg,A cat.\nb.jpg,A dog.\n")
    done = generate_data(pairs, tmp_path / "out", "--kind", "naive")
    assert done.exit_code == 0, done.output
    assert "2 samples written" in done.output
    assert [r["image"] for r in json.loads((tmp_path / "out" / "data.json").read_text())] == ["a.jpg", "b.jpg"]
    done = generate_data(pairs, tmp_path / "o", "--kind", "naive", "--dry-run", "--mix", "x", "--max-per-phrase", "9")
    assert done.exit_code == 2
    assert "without --balance has no use for --mix, --max-per-phrase, --dry-run; leave that out" in done.output
    assert "has no use for --mix, --balance;" in generate_data(
        pairs, tmp_path / "o", "--kind", "detail", "--model", "m", "--balance", "--mix", "1:2:3"
    ).output
    assert not (tmp_path / "o").exists()
