"""tools/doctor: one planted fault of every kind is found, exactly; a clean data set has no finding."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from llava_ds.data.doctor import image_checks
from llava_ds.data.doctor.examine import examine, exit_code, write_report
from llava_ds.data.doctor.findings import CATALOGUE, ERROR
from llava_ds.data.doctor.image_checks import check_image
from llava_ds.data.doctor.length_stats import LengthColumns, describe_lengths, expected_waste
from llava_ds.data.doctor.record_checks import RecordChecks
from llava_ds.data.doctor.salvage import ReadRecord, read_record
from llava_ds.data.doctor.summary import summarize
from llava_ds.data.sources.formats import open_source
from llava_ds.data.sources.llava_json import LlavaJson
from llava_ds.data.sources.shard_writer import write_shards
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.build import load_tokenizer
from llava_ds.schema import Sample, StoredImage, Turn
from tests.helpers.commands import invoke
from tests.helpers.fork_server import Script, run_scripts
from tests.helpers.launch import clean_environ
from tests.helpers.tiny import write_llm

TOOL = Path(__file__).parents[2] / "tools" / "doctor"
MAX_LENGTH, NUM_PATCHES = 120, 9
ASK = {"from": "human", "value": "<image>\nWhat is this?"}
ASK_TEXT = {"from": "human", "value": "Where is the fox?"}
SAY = {"from": "gpt", "value": "a red fox"}
LONG = {"from": "gpt", "value": "two green apples " * 40}


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    return write_llm(tmp_path_factory.mktemp("doctor") / "llm")


@pytest.fixture(scope="module")
def text(llm) -> TextPipeline:
    return TextPipeline(load_tokenizer(str(llm)), "short", "random", NUM_PATCHES, MAX_LENGTH, 0)


def _picture(number: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def _bytes(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def _png_of_16_bits() -> bytes:
    """RGB; PIL writes no such file."""
    rows = b"".join(b"\0" + bytes(20 * 6) for _ in range(20))
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks.items())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _bytes(_picture(), "JPEG", exif=exif)


def _pictures() -> dict[str, tuple[bytes, set[str]]]:
    """Name, content, and what is to be found about it."""
    good_jpeg, good_png = _bytes(_picture(90, (200, 150)), "JPEG"), _bytes(_picture(91), "PNG")
    animated = {"save_all": True, "append_images": [_picture(2), _picture(3)]}
    bad = {"image_does_not_decode"}
    return {
        "jpeg": (good_jpeg, set()),
        "png": (good_png, set()),
        "grey": (_bytes(_picture().convert("L"), "PNG"), set()),
        "palette": (_bytes(_picture().convert("P"), "GIF"), set()),
        "mpo": (_bytes(_picture(), "MPO", **animated), set()),
        "truncated_jpeg": (good_jpeg[: len(good_jpeg) // 2], bad),
        "truncated_png": (good_png[:-200], bad),
        "zeros": (bytes(2000), bad),
        "empty": (b"", bad),
        "unfit": (_bytes(Image.new("L", (17_000, 1)), "PNG"), {"image_unfit"}),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", bad),
        "gif": (_bytes(_picture(), "GIF", **animated), {"image_animated"}),
        "webp": (_bytes(_picture(), "WEBP", **animated), {"image_animated"}),
        "grey16": (_bytes(Image.fromarray(np.full((20, 20), 40_000, np.uint16)), "PNG"), {"image_16_bit"}),
        "rgb16": (_png_of_16_bits(), {"image_16_bit"}),
        "cmyk": (_bytes(_picture().convert("CMYK"), "JPEG"), {"image_cmyk"}),
        "huge": (_bytes(Image.new("L", (5001, 5000)), "PNG"), {"image_huge"}),
        "one_pixel": (_bytes(_picture(4, (1, 1)), "PNG"), {"image_tiny"}),
        "thin": (_bytes(_picture(5, (800, 90)), "PNG"), {"image_elongated"}),
        "line": (_bytes(_picture(6, (600, 7)), "PNG"), {"image_elongated", "image_tiny"}),
        "rotated": (_rotated(), {"image_rotated"}),
        "bad_exif": (good_png[:33] + _chunk(b"eXIf", b"no TIFF") + good_png[33:], {"image_partly_damaged"}),
    }


@pytest.mark.parametrize("name", list(_pictures()))
def test_each_kind_of_picture(tmp_path, name):
    content, wanted = _pictures()[name]
    file = tmp_path / "picture.jpg"  # the name says nothing
    file.write_bytes(content)
    found = check_image(str(file))
    assert {kind for kind, _ in found} == wanted
    assert {kind for kind, _ in check_image(StoredImage("shard.tar:picture", lambda: content))} == wanted
    assert all("picture" in message and kind in CATALOGUE for kind, message in found)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("not_there.png", "image_missing"),
        ("a_folder", "image_does_not_decode"),
        ("nul\0byte.png", "image_does_not_decode"),
        ("half\udcffname.png", "image_missing"),
        ("x" * 5000, "image_does_not_decode"),
        ("file/in_a_file.png", "image_does_not_decode"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, name, wanted):
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "file").write_text("x")
    assert [kind for kind, _ in check_image(f"{tmp_path}/{name}")] == [wanted]


def test_a_bomb_is_refused_and_a_half_bomb_is_huge(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(_bytes(_picture(0, (100, 100)), "PNG"))
    monkeypatch.setattr(image_checks, "HUGE_PIXELS", 5_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    [(kind, message)] = check_image(str(file))
    assert kind == "image_huge" and "bomb" in message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    assert [kind for kind, _ in check_image(str(file))] == ["image_does_not_decode"]


def test_a_stored_image_that_cannot_be_read():
    def read() -> bytes:
        raise DataError("the shard is cut off", reason="a shard is shorter than it was")

    [(kind, message)] = check_image(StoredImage("a.tar:3.jpg", read))
    assert kind == "image_does_not_decode" and "a.tar:3.jpg" in message and "cut off" in message


CONVERSATIONS: dict[str, tuple[list, set[str]]] = {
    "good": ([ASK, SAY], set()),
    "two rounds": ([ASK, SAY, ASK_TEXT, SAY], set()),
    "no turns": ([], {"bad_record"}),
    "a turn without value": ([ASK, {"from": "gpt"}], {"bad_record"}),
    "half a surrogate": ([ASK, {"from": "gpt", "value": "\udc00"}], {"bad_record"}),
    "unknown role": ([ASK, {**SAY, "from": "bot"}], {"unknown_role"}),
    "a system turn": ([{"from": "system", "value": "Be good."}, ASK, SAY], {"unknown_role"}),
    "unknown role and more": (
        [{**ASK, "from": "me"}, {**SAY, "value": ""}, ASK], {"unknown_role", "empty_answer", "image_count_mismatch"},
    ),
    "two questions": ([ASK, ASK_TEXT, SAY], {"turns_do_not_alternate"}),
    "ends with a question": ([ASK, SAY, ASK_TEXT], {"turns_do_not_alternate"}),
    "only an answer": ([SAY], {"turns_do_not_alternate", "leading_answer", "image_count_mismatch"}),
    "no placeholder": ([ASK_TEXT, SAY], {"image_count_mismatch"}),
    "two placeholders": ([{**ASK, "value": "<image><image>What is this?"}, SAY], {"image_count_mismatch"}),
    "image in the answer": ([ASK, {**SAY, "value": "<image>a red fox"}], {"image_in_answer"}),
    "empty answer": ([ASK, {**SAY, "value": ""}], {"empty_answer"}),
    "empty answer and two questions": (
        [ASK, ASK_TEXT, {**SAY, "value": ""}], {"empty_answer", "turns_do_not_alternate"},
    ),
    "blank answer": ([ASK, {**SAY, "value": " \n"}], {"blank_answer"}),
    "only the picture asks": ([{**ASK, "value": "<image>"}, SAY], {"empty_question"}),
    "begins with an answer": ([SAY, ASK, SAY], {"leading_answer"}),
    "begins with an empty answer": ([{**SAY, "value": ""}, ASK, SAY], {"leading_answer"}),
    "last turns are too long": ([ASK, SAY, ASK_TEXT, LONG], {"turns_cut"}),
    "all is too long": ([ASK, LONG], {"too_long"}),
    "eos in the text": ([ASK, {**SAY, "value": "a red fox</s>"}], {"special_token_in_text"}),
    "leaked prompt": ([{**ASK, "value": "<image>\nUSER: What is this? ASSISTANT:"}, SAY], {"template_in_text"}),
}


def _examine(folder: Path, records: list, text: TextPipeline | None, name: str = "train.json", **options) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in records]
    (folder / name).write_text("[" + ",".join(lines) + "]" if name.endswith(".json") else "\n".join(lines))
    return examine(name, open_source(str(folder / name)), text, "short", num_processes=1, **options)


@pytest.mark.parametrize("file", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("case", list(CONVERSATIONS))
def test_each_kind_of_conversation(tmp_path, text, case, file):
    conversations, wanted = CONVERSATIONS[case]
    (tmp_path / "0.png").write_bytes(_bytes(_picture(), "PNG"))
    report = _examine(tmp_path, [{"id": "a", "image": "0.png", "conversations": conversations}], text, file)
    found = set(report["findings"])
    assert found == wanted
    assert all(one["count"] == 1 and one["examples"][0]["id"] == "a" for one in report["findings"].values())
    refused = any(one["severity"] == ERROR for one in report["findings"].values())
    assert report["num_good"] == 1 - refused and exit_code(report) == refused
    # The verdict is that of training.
    try:
        text.encode_orders(open_source(str(tmp_path / file))[0])
    except DataError:
        assert refused
    else:
        assert not refused


@pytest.mark.parametrize("template", ["v1", "plain", "v0", "llava_llama_2", "chatml"])
def test_the_verdict_is_that_of_training_on_awkward_conversations(text, template):
    records = json.loads((Path(__file__).parents[1] / "golden" / "conversations.json").read_text())
    source = LlavaJson("conversations.json", "", records, Path("images"))
    pipeline = TextPipeline(text.tokenizer, template, "random", NUM_PATCHES, 700, 0)
    checks, verdicts = RecordChecks(pipeline, template), []
    for index in range(len(records)):
        found, encoded = checks.check(read_record(source, index))
        try:
            trained = pipeline.encode_orders(source[index])[0]
        except DataError:
            trained = None
        assert encoded == trained, records[index]["id"]
        verdicts.append(any(CATALOGUE[name][0] == ERROR for name, _ in found))
        assert verdicts[-1] == (trained is None), records[index]["id"]
    assert len(set(verdicts)) == 2 and len(verdicts) > 30


def test_a_bad_record_still_has_its_images_looked_at(tmp_path, text):
    records = [
        {"id": "a", "image": "gone.png", "conversations": [ASK, {**SAY, "from": "bot"}]},
        {"id": "b", "image": "gone too.png", "conversations": []},
        {"id": "c", "image": ["gone.png", "there.png"], "conversations": [ASK_TEXT, ASK_TEXT, {**SAY, "value": ""}]},
        {"image": "0.png", "conversations": [ASK, SAY]},
        17,
    ]
    (tmp_path / "there.png").write_bytes(_bytes(_picture(), "PNG"))
    report = _examine(tmp_path, records, text)
    assert {name: one["count"] for name, one in report["findings"].items()} == {
        "bad_record": 3, "unknown_role": 1, "turns_do_not_alternate": 1, "image_count_mismatch": 1, "empty_answer": 1,
        "image_missing": 3, "image_shared": 2,
    }
    missing = report["findings"]["image_missing"]
    assert missing["num_images"] == 2
    assert [(one["origin"], one["id"]) for one in missing["examples"]] == [
        ("train.json[0]", "a"), ("train.json[1]", "b")
    ]
    assert [one["origin"] for one in report["findings"]["bad_record"]["examples"]] == [
        "train.json[1]", "train.json[3]", "train.json[4]"
    ]
    assert report["num_good"] == 0 and report["lengths"] is None and report["waste"] is None


def test_other_templates_and_policies_refuse_by_their_own_rules(tmp_path, text):
    (tmp_path / "0.png").write_bytes(_bytes(_picture(), "PNG"))
    one = {"id": "one", "image": "0.png", "conversations": [{**ASK, "value": "<image>"}, SAY]}
    two = {"id": "two", "image": "0.png", "conversations": [ASK, SAY, ASK_TEXT, LONG]}
    plain = TextPipeline(text.tokenizer, "plain", "random", NUM_PATCHES, MAX_LENGTH, 0)
    found = _examine(tmp_path, [one, two], plain)["findings"]
    assert set(found) == {"refused_by_template", "image_shared"}  # a question without text is as it should be
    assert "one question and one answer" in found["refused_by_template"]["examples"][0]["message"]
    strict = TextPipeline(text.tokenizer, "short", "random", NUM_PATCHES, MAX_LENGTH, 0, "drop_sample")
    assert set(_examine(tmp_path, [one, two], strict)["findings"]) == {"too_long", "empty_question", "image_shared"}
    with pytest.raises(ConfigError, match="unknown template"):
        _examine(tmp_path, [one], TextPipeline(text.tokenizer, "shrt", "random", NUM_PATCHES, MAX_LENGTH, 0))


def test_no_supervised_token_is_an_error(text):
    # The official policy cuts text-only samples hard.
    official = TextPipeline(text.tokenizer, "short", "as_data", NUM_PATCHES, 6, 0, "official")
    sample = Sample("a", (), (Turn("user", "What is this? " * 9), Turn("assistant", "a red fox")), "x[0]")
    found, encoded = RecordChecks(official, "short").check(ReadRecord("x[0]", sample))
    assert [name for name, _ in found] == ["text_only", "no_supervised_token"] and encoded is None


def test_unknown_tokens_are_a_note(llm):
    tokenizer = load_tokenizer(str(llm))  # it knows every byte, so a known token plays the unknown one
    sample = Sample("a", (), (Turn("user", "What is this?"), Turn("assistant", "a red fox")), "x[0]")
    checks = RecordChecks(TextPipeline(tokenizer, "short", "as_data", NUM_PATCHES, MAX_LENGTH, 0), "short")
    assert [name for name, _ in checks.check(ReadRecord("x[0]", sample))[0]] == ["text_only"]
    ids = checks.text.encode(sample, 0).input_ids
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(ids[-2])
    found = dict(checks.check(ReadRecord("x[0]", sample))[0])
    assert set(found) == {"text_only", "unknown_token"} and f" of {len(ids)} tokens" in found["unknown_token"]


def _clean(folder: Path, num: int = 700) -> list[dict]:
    """More records than a chunk holds; every fourth has two rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        (folder / f"{number}.png").write_bytes(_bytes(_picture(number, (12, 10)), "PNG"))
    return [
        {"id": f"s{number}", "image": f"{number}.png",
         "conversations": [ASK, SAY, ASK_TEXT, SAY] if number % 4 == 0 else [ASK, SAY]}
        for number in range(num)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """A file with 700 clean records and one of every fault at its end, and how many records have each finding."""
    folder = tmp_path_factory.mktemp("planted")
    records = _clean(folder)
    counts: dict[str, int] = {}
    for number, (conversations, wanted) in enumerate(CONVERSATIONS.values()):
        (folder / f"c{number}.png").write_bytes(_bytes(_picture(number), "PNG"))
        records.append({"id": f"c{number}", "image": f"c{number}.png", "conversations": conversations})
        counts |= {name: counts.get(name, 0) + 1 for name in wanted}
    for name, (content, wanted) in _pictures().items():
        (folder / f"{name}.jpg").write_bytes(content)
        records.append({"id": f"p{name}", "image": f"{name}.jpg", "conversations": [ASK, SAY]})
        counts |= {name: counts.get(name, 0) + 1 for name in wanted}
    records += [
        {"id": "s1", "image": "jpeg.jpg", "conversations": [ASK, {**SAY, "value": "two green apples"}]},
        {**records[2], "id": "another id"},
        {"id": "gone", "image": "gone.jpg", "conversations": [ASK, SAY]},
        {"id": "words", "conversations": [ASK_TEXT, SAY]},
    ]
    counts |= {"duplicate_id": 1, "duplicate_record": 1, "image_missing": 1, "text_only": 1, "image_shared": 4}
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json", counts


def test_one_planted_fault_of_every_kind(planted, text):
    file, counts = planted
    report = examine(str(file), open_source(str(file)), text, num_processes=1)
    assert {name: one["count"] for name, one in report["findings"].items()} == counts
    not_planted = {"refused_by_template", "no_supervised_token", "unknown_token"}  # other settings have them
    assert set(counts) == set(CATALOGUE) - not_planted
    assert report["findings"]["duplicate_record"]["examples"][0]["message"] == "the same as train.json[2] id='s2'"
    assert report["findings"]["duplicate_id"]["examples"][0]["message"] == "the same as train.json[1] id='s1'"
    num_refused = sum(
        any(CATALOGUE[name][0] == ERROR for name in wanted)
        for _, wanted in [*CONVERSATIONS.values(), *_pictures().values()]
    )
    assert report["num_good"] == report["data"]["num_records"] - num_refused - 1  # and gone.jpg
    summary = summarize(report)
    assert all(f"{name}: " in summary for name in counts)
    assert "train.json" in summary and "ERRORS" in summary and "expected waste" in summary


@pytest.mark.parametrize("num_processes", [2, 3])
def test_the_report_does_not_depend_on_the_number_of_processes(planted, text, num_processes):
    file, _ = planted
    reports = [
        examine(str(file), open_source(str(file)), text, num_processes=number) for number in (1, num_processes)
    ]
    for report in reports:
        assert report.pop("seconds") > 0 and report.pop("num_processes")
    assert reports[0] == reports[1]


def test_captions_and_their_places(tmp_path):
    (tmp_path / "0.png").write_bytes(_bytes(_picture(), "PNG"))
    (tmp_path / "pairs.csv").write_text("image,caption\n0.png,a fox\n0.png,\ngone.png,a fox\n0.png,two apples\n")
    report = examine("pairs.csv", open_source(str(tmp_path / "pairs.csv")), None, "plain", num_processes=1)
    places = {name: [one["origin"] for one in found["examples"]] for name, found in report["findings"].items()}
    assert places == {
        "bad_record": ["pairs.csv:3"], "image_missing": ["pairs.csv:4"],
        "image_shared": [],
    }
    assert summarize(report).count("pairs.csv:3") == 1


def test_images_in_shards(tmp_path, text):
    records = _clean(tmp_path / "data", 20)
    (tmp_path / "data" / "3.png").write_bytes(_pictures()["cmyk"][0])
    write_shards(open_source(str(_write(tmp_path / "data", records))), tmp_path / "shards", samples_per_shard=7)
    report = examine("shards", open_source(str(tmp_path / "shards")), text, num_processes=2)
    assert report["num_good"] == 20 and set(report["findings"]) == {"image_cmyk"}
    assert report["findings"]["image_cmyk"]["examples"][0]["id"] == "s3"


def test_examples_are_few_and_the_first(tmp_path, text):
    records = [{"id": str(n), "image": "gone.png", "conversations": [ASK]} for n in range(600)]
    found = _examine(tmp_path, records, text)["findings"]
    assert found["turns_do_not_alternate"]["count"] == found["image_missing"]["count"] == 600
    assert [one["id"] for one in found["turns_do_not_alternate"]["examples"]] == ["0", "1", "2", "3", "4"]
    assert found["image_missing"]["num_images"] == 1 and len(found["image_missing"]["examples"]) == 1


def test_an_image_twice_in_one_record_is_not_shared(tmp_path, text):
    (tmp_path / "0.png").write_bytes(_bytes(_picture(), "PNG"))
    twice = {"id": "a", "image": ["0.png", "0.png"], "conversations": [{**ASK, "value": "<image><image>Which?"}, SAY]}
    assert _examine(tmp_path, [twice], None)["findings"] == {}


def test_lengths_and_waste_by_hand():
    columns = LengthColumns(np.array([10, 20, 30, 40]), np.array([1, 2, 3, 4]), np.array([1, 0, 2, 1]))
    described = describe_lengths(columns, 64)
    assert described["tokens"] == {
        "percentiles": {"0": 10, "5": 10, "25": 10, "50": 20, "75": 30, "95": 40, "99": 40, "100": 40},
        "mean": 25.0, "total": 100,
    }  # fmt: skip
    assert described["supervised_frac"] == 0.1 and described["images"]["total"] == 4
    assert described["histogram"]["edges"] == list(range(65))
    assert [n for n, count in enumerate(described["histogram"]["tokens"]) if count] == [10, 20, 30, 40]
    # One rank, one batch: nobody waits; padded to 40 it computes 4 x 40.
    waste = expected_waste(columns, 1, 4)
    assert waste["packed"] == 0 and waste["padded"] == waste["padded_by_length"] == 1 - 100 / 160
    # Four ranks with one sample each wait for the 40.
    assert expected_waste(columns, 4, 4)["packed"] == 1 - 100 / 160


def _run(*options: object) -> subprocess.CompletedProcess:
    """The command as a user starts it."""
    command, environ = [sys.executable, str(TOOL), *map(str, options)], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)


def _script(*options: object) -> Script:
    """The command as a process of its own."""
    return Script([str(TOOL), *map(str, options)], clean_environ())


def _invoke(*options: object) -> Result:
    return invoke("doctor", *options)


def _write(folder: Path, records: list[dict]) -> Path:
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def test_command_on_a_clean_data_set(tmp_path, llm):
    file = _write(tmp_path, _clean(tmp_path, 40))
    done = _run(
        file, "--tokenizer", llm, "--template", "short", "--num-patches", 9, "--max-length", 120,
        "--json", tmp_path / "report.json", "--plot", tmp_path / "lengths.png", "--world-size", 2,
        "--global-batch-size", 8, "--num-processes", 2, "--strict",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 of 40 records are good" in done.stdout
    assert "WARNINGS" not in done.stdout and "NOTES" not in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {
        "version", "data", "settings", "num_good", "findings", "not_checked", "lengths", "waste", "num_processes",
        "seconds",
    }  # fmt: skip
    assert report["version"] == 1 and report["findings"] == {} and report["not_checked"] == []
    assert report["data"]["path"] == str(file) and report["data"]["num_records"] == 40
    assert len(report["data"]["fingerprint"]) == 64
    assert report["settings"] == {
        "tokenizer": str(llm), "template": "short", "placement": "random", "max_length": 120,
        "truncation": "drop_last_turns", "num_patches": 9, "images": True, "world_size": 2, "global_batch_size": 8,
    }  # fmt: skip
    assert report["waste"]["num_steps"] == 5 and 0 <= report["waste"]["packed"] < report["waste"]["padded"] < 1
    with Image.open(tmp_path / "lengths.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 50
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".png",)) == [
        "report.json", "train.json"
    ]  # nothing half-written


def test_command_exit_codes(tmp_path):
    records = _clean(tmp_path, 3)
    records[1]["id"] = "s0"
    (tmp_path / "warned").mkdir()
    warned = _write(tmp_path / "warned", records)
    records[2]["image"] = "gone.png"
    faulty = _write(tmp_path, records)
    strict, errors, unreadable = run_scripts(
        [_script(warned, "--strict", "--image-root", tmp_path), _script(faulty), _script(tmp_path / "gone.json")]
    )
    assert [strict.returncode, errors.returncode, unreadable.returncode] == [1, 1, 2]
    assert "duplicate_id" in strict.stdout and "no tokenizer was given" in strict.stdout
    assert "image_missing" in errors.stdout and "2 of 3 records are good" in errors.stdout
    assert "no such file" in unreadable.stderr and "Traceback" not in unreadable.stderr
    assert _invoke(warned, "--image-root", tmp_path).exit_code == 0
    untouched = _invoke(faulty, "--no-images")
    assert untouched.exit_code == 0 and "left alone" in untouched.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["broken.json"], "not valid JSON"),
        (["train.json", "--template", "v7"], "unknown template"),
        (["train.json", "--truncation", "sometimes"], "Invalid value"),
        (["train.json", "--json", "no/such/folder.json"], "there is no folder"),
        (["train.json", "--plot", "a.png"], "need --tokenizer"),
        (["train.json", "--tokenizer", "no_such_folder"], "no tokenizer can be loaded"),
    ],
)
def test_command_with_unusable_input_ends_with_2(tmp_path, monkeypatch, options, message):
    _write(tmp_path, _clean(tmp_path, 2))
    (tmp_path / "broken.json").write_text("[{")
    monkeypatch.chdir(tmp_path)
    done = _invoke(*options)
    assert done.exit_code == 2 and message in done.stderr and isinstance(done.exception, SystemExit)


def test_command_where_no_record_is_good(tmp_path, llm):
    file = _write(tmp_path, [{"id": "a", "image": "gone.png", "conversations": [ASK, SAY]}])
    done = _invoke(
        file, "--tokenizer", llm, "--template", "short", "--json", tmp_path / "r.json", "--plot", tmp_path / "a.png"
    )
    assert done.exit_code == 1 and "a.png: not drawn" in done.stdout and not (tmp_path / "a.png").exists()
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["num_good"] == 0 and report["lengths"] is None and report["waste"] is None


def test_a_report_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        write_report({}, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_killed_process_is_an_error(tmp_path, monkeypatch):
    records = _clean(tmp_path, 600)
    monkeypatch.setattr("llava_ds.data.doctor.passes.check_image", lambda image: os._exit(9))
    source = open_source(str(_write(tmp_path, records)))
    with pytest.raises(DataError, match="was killed"):
        examine("x", source, None, "short", num_processes=2)
