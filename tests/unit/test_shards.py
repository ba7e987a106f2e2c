"""Shards are read as they were written, by us and by webdataset, from disks and from servers; damage is named."""

import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import fsspec
import PIL.Image
import pytest

from llava_ds.data.sources import shard_files, shard_index
from llava_ds.data.sources.shard_files import expand_braces
from llava_ds.data.sources.shard_writer import write_shards
from llava_ds.data.sources.shards import open_shards
from llava_ds.errors import BackendUnavailableError, ConfigError, DataError
from llava_ds.schema import Sample, StoredImage, Turn
from llava_ds.text.instructions import BRIEF_INSTRUCTIONS, draw_instruction
from tests.helpers.fork_server import Script, run_scripts
from tests.helpers.launch import clean_environ

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path / "cache"))


def _picture(kind: str, shade: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (5, 4), (shade % 256, 9, 9)).save(buffer, kind)
    return buffer.getvalue()


class _List:
    """A source of samples, where a text stands for a bad record."""

    name = "list"
    fingerprint = "x"

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if isinstance(item, str):
            raise DataError(f"list[{index}]: {item}", reason=item)
        return item


def _samples(folder: Path, count: int = 7) -> list[Sample]:
    """Samples with 1, 2, 0, 1, 2, ... images, as files and inside tables."""
    samples = []
    for number in range(count):
        images = []
        for place in range((number + 1) % 3):
            content = _picture(("JPEG", "PNG", "WEBP")[(number + place) % 3], number)
            path = folder / f"{number}_{place}.x"
            path.write_bytes(content)
            images.append(str(path) if number % 2 else StoredImage(path.name, path.read_bytes))
        turns = (
            Turn(
                "user",
                "<image>\n" * len(images)
                + f"Hi \ud83d\ude00 é {number}".encode("utf-16", "surrogatepass").decode("utf-16"),
            ),
            Turn("assistant", "Ho"),
        )
        samples.append(Sample(f"id/{number}", tuple(images), turns, f"list[{number}]"))
    return samples


def _bytes(image):
    return Path(image).read_bytes() if isinstance(image, str) else image.read()


def _content(source):
    return [(s.id, s.turns, [_bytes(image) for image in s.images]) for s in source]


def _write(tmp_path, count=7, **settings):
    samples = _samples(tmp_path, count)
    out = tmp_path / "out"
    write_shards(_List(samples), out, **{"samples_per_shard": 3} | settings)
    return out, _content(samples)


def _tar(path, members, format=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def _record(**others):
    chat = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}]
    return json.dumps({"id": "a", "conversations": chat} | others).encode()


@pytest.mark.parametrize(("count", "num_shards"), [(1, 1), (3, 1), (7, 3)])
def test_round_trip(tmp_path, count, num_shards):
    out, wanted = _write(tmp_path, count)
    source = open_shards(str(out))
    assert _content(source) == wanted
    assert len(list(out.glob("*.tar"))) == num_shards
    names = [image.name for sample in source for image in sample.images]
    assert len(set(names)) == len(names) == sum(len(images) for _, _, images in wanted)
    assert source[0].origin == "train-000000.tar:000000000"
    assert source[0].images[0].name == f"{out}/train-000000.tar/000000000.jpg"
    with pytest.raises(IndexError):
        source[count]


def test_the_list_that_is_written_last(tmp_path):
    out, wanted = _write(tmp_path)
    done = json.loads((out / "shards.json").read_text())
    assert {f["name"]: f["sha256"] for f in done["shards"]} == {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.glob("*.tar")
    }
    assert (done["num_samples"], done["num_images"], done["skipped"]) == (7, sum(len(i) for _, _, i in wanted), {})
    assert done["bytes"] == sum(f.stat().st_size for f in out.glob("*.tar"))
    names = [f"train-{n:06d}.tar{end}" for n in range(3) for end in ("", ".index.json")]
    assert sorted(os.listdir(out)) == ["shards.json", *names]


def test_bytes_depend_on_the_samples_alone(tmp_path):
    first, _ = _write(tmp_path)
    before = os.umask(0o077)
    try:
        shutil.move(first, tmp_path / "first")
        second, _ = _write(tmp_path)
    finally:
        os.umask(before)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_tarfile_and_webdataset_read_what_was_written(tmp_path):
    wds = pytest.importorskip("webdataset")
    out, wanted = _write(tmp_path)
    tars = sorted(map(str, out.glob("*.tar")))
    found = list(wds.WebDataset(tars, shardshuffle=False))
    assert len(found) == len(wanted) == 7
    for raw, (sample_id, turns, images) in zip(found, wanted, strict=True):
        record = json.loads(raw["json"])
        names = record.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert [raw[name.partition(".")[2]] for name in names] == images
        assert record["id"] == sample_id
        assert [turn["value"] for turn in record["conversations"]] == [turn.text for turn in turns]
    decoded = next(iter(wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("json", "jpg")))
    assert decoded[0]["id"] == "id/0" and decoded[1].size == (5, 4)
    with tarfile.open(tars[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}


def test_shards_that_webdataset_wrote(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "w-%04d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            writer.write({"__key__": f"k{number}", "jpg": _picture("JPEG", number), "txt": f"Caption {number}."})
        chat = json.loads(_record(image=["x/y.jpg", "z.png"]))
        writer.write({"__key__": "k3", "json": chat, "0.jpg": _picture("JPEG", 7), "1.png": _picture("PNG", 8)})
    source = open_shards(str(tmp_path / "w-{0000..0001}.tar"), seed=2)
    assert [s.id for s in source] == ["k0", "k1", "k2", "a"]
    question = draw_instruction(BRIEF_INSTRUCTIONS, 2, "k1")
    assert source[1].turns == (Turn("user", f"<image>\n{question}"), Turn("assistant", "Caption 1."))
    assert [image.read() for image in source[1].images] == [_picture("JPEG", 1)]
    assert [image.read() for image in source[3].images] == [_picture("JPEG", 7), _picture("PNG", 8)]
    assert _content(open_shards(str(tmp_path), seed=2)) == _content(source)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars(tmp_path, format):
    key = "dir/" + "k" * 90 + "é" * (0 if format == tarfile.USTAR_FORMAT else 60)
    note = json.dumps({"caption": "Note.", "url": "x"}).encode()
    members = [
        ("__meta__", b"x"),
        ("README", b"x"),
        ("._hidden.jpg", b"x"),
        (f"{key}.jpg", b"one"),
        (f"{key}.json", _record()),
        (f"{key}.cls", b"3"),
        ("b.JPG", b"two"),
        ("b.txt", b"Cap.\n"),
        ("b.json", note),
        ("c.png", b"three"),
        ("c.json", note),
    ]
    source = open_shards(str(_tar(tmp_path / "x.tar", members, format)))
    assert [(s.id, s.turns[1].text, s.images[0].read()) for s in source] == [
        ("a", "Ho", b"one"), ("b", "Cap.", b"two"), ("c", "Note.", b"three"),
    ]  # fmt: skip


def test_a_scan_gives_what_the_index_gives_and_is_remembered(tmp_path, monkeypatch):
    out, wanted = _write(tmp_path)
    indexed = open_shards(str(out)).samples
    for index in out.glob("*.index.json"):
        index.unlink()
    assert open_shards(str(out)).samples == indexed
    scans = []
    monkeypatch.setattr(shard_index, "scan_tar", lambda file: scans.append(file) or 1 / 0)
    assert _content(open_shards(str(out))) == wanted
    os.utime(out / "train-000001.tar", ns=(1, 1))
    with pytest.raises(ZeroDivisionError):
        open_shards(str(out))
    assert [file.name for file in scans] == ["train-000001.tar"]


def test_a_damaged_cache_is_made_again_and_none_is_no_error(tmp_path, capsys):
    _tar(tmp_path / "x.tar", [("a.json", _record()), ("a.jpg", b"1")])
    wanted = _content(open_shards(str(tmp_path / "x.tar")))
    (cached,) = (tmp_path / "cache/shards").iterdir()
    cached.write_text("{")
    assert _content(open_shards(str(tmp_path / "x.tar"))) == wanted
    assert json.loads(cached.read_text())["members"]
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    assert _content(open_shards(str(tmp_path / "x.tar"))) == wanted
    assert "no index is kept" in capsys.readouterr().err


def test_pickling_and_fork(tmp_path):
    out, wanted = _write(tmp_path)
    source = open_shards(str(out))
    assert _content(source) == wanted
    assert _content(pickle.loads(pickle.dumps(source))) == wanted
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert _content(pool.map(source.__getitem__, list(range(7)) * 20)) == wanted * 20


def test_threads_share_few_descriptors(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    samples = [Sample(str(n), (), (Turn("user", "a"), Turn("assistant", "b")), "") for n in range(300)]
    write_shards(_List(samples), tmp_path / "out", samples_per_shard=1)
    source = open_shards(str(tmp_path / "out"))
    with ThreadPoolExecutor(8) as pool:
        assert [s.id for s in pool.map(source.__getitem__, [*range(300)] * 3)] == [str(n) for n in range(300)] * 3
    assert (
        sum(
            "/out/train-" in os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{fd}")
        )
        <= 128
    )


def test_limits_of_a_shard(tmp_path):
    samples = [
        Sample(str(n), (), (Turn("user", "a"), Turn("assistant", "b" * size)), "")
        for n, size in enumerate([3000] * 20 + [90_000, 5])
    ]
    written = write_shards(_List(samples), tmp_path / "out", max_shard_bytes=20_480)
    sizes = [(tmp_path / "out" / shard.name).stat().st_size for shard in written.shards]
    assert [shard.bytes for shard in written.shards] == sizes
    assert max(size for size, shard in zip(sizes, written.shards, strict=True) if shard.num_samples > 1) == 20_480
    assert [shard.num_samples for shard in written.shards] == [4, 4, 4, 4, 4, 1, 1]
    assert [s.id for s in open_shards(str(tmp_path / "out"))] == [str(n) for n in range(22)]


def test_bad_samples_are_errors_or_counted(tmp_path):
    good = _samples(tmp_path, 2)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    ico = tmp_path / "x.png"
    PIL.Image.new("RGB", (16, 16)).save(ico, "ICO")
    bad = [Sample("b", (str(path),), good[0].turns, "r") for path in (text, ico, tmp_path / "none.png", "x\0y")]
    with pytest.raises(DataError, match=r"list\[1\]: too odd"):
        write_shards(_List([good[0], "too odd"]), tmp_path / "a")
    for sample in bad:
        with pytest.raises(DataError, match=r"r id='b': image .*(does not decode|is ico|cannot be read)"):
            write_shards(_List([sample]), tmp_path / hashlib.sha256(sample.images[0].encode()).hexdigest())
    written = write_shards(_List([good[0], "too odd", *bad, "too odd", good[1]]), tmp_path / "b", on_bad_sample="skip")
    assert written.skipped == {
        "image does not decode": 1,
        "image file is missing": 2,
        "image of a format that shards do not hold": 1,
        "too odd": 2,
    }
    assert _content(open_shards(str(tmp_path / "b"))) == _content(good)
    with pytest.raises(DataError, match="no sample to write; 1 were skipped"):
        write_shards(_List(["too odd"]), tmp_path / "c", on_bad_sample="skip")


def test_a_stopped_run_leaves_a_folder_that_is_refused(tmp_path):
    class Stopped(_List):
        def __getitem__(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_shards(Stopped(_samples(tmp_path)), out, samples_per_shard=2)
    assert (out / "train-000001.tar").exists()
    for spec in (out, out / "train-000000.tar", out / "train-{000000..000001}.tar"):
        with pytest.raises(DataError, match="unfinished.*delete the folder"):
            open_shards(str(spec))
    with pytest.raises(ConfigError, match="delete the folder"):
        write_shards(_List(_samples(tmp_path)), out)
    with pytest.raises(ConfigError, match="not an empty folder"):
        write_shards(_List(_samples(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.json", _record(image="x.jpg"))], r"x.tar:k id='a': the record names 1 image\(s\), the shard holds 0"),
        ([("k.json", _record(image=["x", "y"])), ("k.jpg", b"")], "names 2 image"),
        ([("k.jpg", b"")], r"x.tar:k: an image without its record \(k.jpg\); add k.json or k.txt"),
        ([("k.txt", b"A cat.")], r"x.tar:k: a pair needs one image, the shard holds 0"),
        ([("k.txt", b" "), ("k.jpg", b"")], "no 'caption'"),
        ([("k.txt", b"\xff"), ("k.jpg", b"")], "x.tar:k: not UTF-8"),
        ([("k.json", b"{"), ("k.jpg", b"")], "x.tar:k: not valid JSON"),
        ([("k.json", b"[" * 100_000), ("k.jpg", b"")], "x.tar:k: not valid JSON"),
        ([("k.json", b"[]"), ("k.jpg", b"")], "x.tar:k: expected an object, got list"),
        ([("k.json", _record()), ("k.json", _record())], "x.tar:k: a member stands twice"),
        ([("k.json", _record()), ("k.0.jpg", b""), ("k.2.jpg", b"")], "without gap"),
        ([("k.json", _record()), ("k.jpg", b""), ("k.png", b"")], "without gap"),
        ([("k.json", _record(conversations=[]))], "x.tar:k id='a': 'conversations' is empty"),
    ],
)
def test_bad_samples_of_a_shard_are_named(tmp_path, members, message):
    source = open_shards(str(_tar(tmp_path / "x.tar", [*members, ("z.json", _record()), ("z.jpg", b"")])))
    with pytest.raises(DataError, match=message):
        source[0]
    assert source[1].images[0].read() == b""  # its neighbour is whole


def test_a_truncated_tar_at_any_length(tmp_path):
    whole = _tar(tmp_path / "x.tar", [("a.json", _record()), ("a.jpg", b"1" * 700)]).read_bytes()
    end = 512 + 512 + 512 + 1024
    path = tmp_path / "y.tar"
    lengths = [0, 1, 511, 512, 513, 1023, 1024, 1025, 1535, 1536, 1537, 2235, 2236, 2237, end - 1, end, end + 511]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"y.tar: not a whole tar"):
            open_shards(str(path))
    path.write_bytes(whole[: end + 512])
    assert len(open_shards(str(path))) == 1


def test_damaged_and_compressed_tars(tmp_path):
    whole = bytearray(_tar(tmp_path / "x.tar", [(f"{k}.json", _record()) for k in "abc"]).read_bytes())
    whole[1024 + 5] ^= 1  # in the second header: tarfile alone would stop there in silence
    (tmp_path / "x.tar").write_bytes(whole)
    with pytest.raises(DataError, match="after 1 members, byte 1024 of 10240 is no end"):
        open_shards(str(tmp_path / "x.tar"))
    (tmp_path / "x.tar").write_bytes(gzip.compress(bytes(whole)))
    with pytest.raises(DataError, match="a compressed one must be unpacked"):
        open_shards(str(tmp_path / "x.tar"))
    two = _tar(tmp_path / "x.tar", [("a.json", _record())]).read_bytes() * 2
    (tmp_path / "x.tar").write_bytes(two)
    with pytest.raises(DataError, match="nothing behind it"):
        open_shards(str(tmp_path / "x.tar"))
    with pytest.raises(DataError, match="shards are .tar files"):
        open_shards(str(tmp_path / "x-{0..1}.tar.gz"))


def test_a_shard_that_shrinks_or_changes_after_it_was_opened(tmp_path):
    path = _tar(tmp_path / "x.tar", [("a.json", _record()), ("a.jpg", b"1" * 700)])
    source = open_shards(str(path))
    os.truncate(path, 1000)
    shard_files._descriptor.cache_clear()  # as in a worker that has not opened it yet
    with pytest.raises(DataError, match="has changed since it was opened"):
        source[0]
    path = _tar(tmp_path / "y.tar", [("a.json", _record()), ("a.jpg", b"1" * 700)])
    source = open_shards(str(path))
    image = source[0].images[0]
    os.truncate(path, 2000)
    with pytest.raises(DataError, match="asked for bytes 1024 to 2236, got 976"):
        image.read()


def test_an_index_that_does_not_fit(tmp_path):
    out, _ = _write(tmp_path, count=3)
    index, tar = out / "train-000000.tar.index.json", out / "train-000000.tar"
    good = json.loads(index.read_text())

    def refused(value, message):
        index.write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(DataError, match=message):
            open_shards(str(tar))

    refused(good | {"tar_bytes": 5}, f"made for a tar of 5 bytes, but .* has {tar.stat().st_size}")
    refused(good | {"members": [["a.json", 10**9, 5]]}, "is not inside the tar")
    refused(good | {"members": [["a.json", 0, 5]]}, "is not inside the tar")
    refused(good | {"members": [["a.json"]]}, "a damaged index")
    refused("[", "a damaged index")
    refused("[]", "a damaged index")
    name, offset, size = good["members"][0]
    for wrong in ([name, offset + 512, size], [name, offset, size + 1], [name, offset + 3, size]):
        index.write_text(json.dumps(good | {"members": [wrong]}))
        with pytest.raises(DataError, match="train-000000.tar:000000000: .* is not at byte|names 1 image"):
            open_shards(str(tar))[0]


def test_missing_shards_and_folders(tmp_path):
    out, _ = _write(tmp_path)
    with pytest.raises(DataError, match="train-000003.tar: no such shard"):
        open_shards(str(out / "train-{000000..000003}.tar"))
    (out / "train-000001.tar").rename(tmp_path / "aside")
    with pytest.raises(DataError, match="train-000001.tar: no such shard"):
        open_shards(str(out))
    (out / "train-000001.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-000001.tar: 5 bytes, but shards.json says \d+"):
        open_shards(str(out))
    (out / "shards.json").write_text("{}")
    with pytest.raises(DataError, match=r"shards.json: damaged"):
        open_shards(str(out))
    with pytest.raises(DataError, match="no such folder"):
        open_shards(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .tar here"):
        open_shards(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no member KEY.json"):
        open_shards(str(_tar(tmp_path / "x.tar", [("a.cls", b"")])))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("a{3..3}", ["a3"]),
        ("a{0..0}", ["a0"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names
    assert names == list(pytest.importorskip("braceexpand").braceexpand(pattern))


@pytest.mark.parametrize("pattern", ["a{0..", "a}", "a{b{0..1}}", "a{3..1}", "a{x}", "{}", "a{0...3}"])
def test_braces_that_are_no_pattern(pattern):
    with pytest.raises(ConfigError, match=re.escape(repr(pattern))):
        expand_braces(pattern)


@pytest.mark.parametrize("with_index", [True, False])
def test_urls_of_fsspec(tmp_path, with_index):
    out, wanted = _write(tmp_path)
    memory = fsspec.filesystem("memory")
    for file in out.iterdir():
        if with_index or file.suffix == ".tar":
            memory.pipe(f"/{tmp_path.name}/{file.name}", file.read_bytes())
    base = f"memory://{tmp_path.name}"
    for spec in (base, f"{base}/", f"{base}/train-{{000000..000002}}.tar", f"file://{out}"):
        source = open_shards(spec)
        assert _content(source) == wanted
    source = open_shards(base)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert _content(pool.map(source.__getitem__, [*range(7)])) == wanted
    with pytest.raises(DataError, match="train-000003.tar: no such file"):
        open_shards(f"{base}/train-{{000000..000003}}.tar")
    with pytest.raises(DataError, match="no .tar here"):
        open_shards("memory://nowhere")
    memory.pipe(f"/{tmp_path.name}/train-000000.tar", memory.cat_file(f"/{tmp_path.name}/train-000000.tar")[:1000])
    with pytest.raises(DataError, match="train-000000.tar: .*(not a whole tar|1000 bytes, but shards.json says)"):
        open_shards(base)


def test_a_protocol_whose_package_is_missing_or_unknown(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(DataError, match="nope://x/.*: cannot be read: ValueError: Protocol not known"):
        open_shards("nope://x/y.tar")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(BackendUnavailableError, match=r"Install s3fs.*\[data\]"):
        open_shards("s3://bucket/y.tar")


@pytest.mark.parametrize(("num_failures", "num_calls"), [(0, 1), (2, 3), (3, 3)])
def test_a_hiccup_of_the_network_is_tried_again(monkeypatch, num_failures, num_calls):
    calls = []

    def flaky(fs, path):
        calls.append(path)
        if len(calls) <= num_failures:
            raise ConnectionResetError
        return b"ok"

    monkeypatch.setattr(shard_files.time, "sleep", lambda seconds: None)
    if num_failures < 3:
        assert shard_files._remotely("memory://x", flaky) == b"ok"
    else:
        with pytest.raises(DataError, match="memory://x: cannot be read: ConnectionResetError"):
            shard_files._remotely("memory://x", flaky)
    assert len(calls) == num_calls


class _RangeHandler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    serves_ranges = True
    disable_nagle_algorithm = True

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content, total = path.read_bytes(), path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and self.serves_ranges:
            first, last = int(span[1]), min(int(span[2] or total), total - 1)
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes" if self.serves_ranges else "none")
        self.end_headers()
        self.wfile.write(content)
        self.server.num_bytes += len(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    handler = type("Handler", (_RangeHandler,), {})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tmp_path)))
    served.num_bytes, served.handler, served.daemon_threads = 0, handler, True
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="fsspec reads http through aiohttp")
def test_shards_of_a_real_server(tmp_path, server):
    out, wanted = _write(tmp_path, count=30, samples_per_shard=30)
    base = f"http://127.0.0.1:{server.server_port}/out"
    assert _content(open_shards(base)) == wanted
    source = open_shards(f"{base}/train-{{000000..000000}}.tar")
    server.num_bytes = 0
    assert source[1].images[0].read() == wanted[1][2][0]
    assert 0 < server.num_bytes < 4000  # one range for the record, one for the image
    with multiprocessing.get_context("fork").Pool(2) as pool:  # after the parent's event loop has run
        assert _content(pool.map(source.__getitem__, range(30))) == wanted
    (out / "train-000000.tar.index.json").unlink()
    assert _content(open_shards(f"{base}/train-000000.tar")) == wanted
    for spec, message in (
        (f"{base}/train-{{000000..000001}}.tar", "train-000001.tar: no such file"),
        (f"{base}/x", "x: "),
    ):
        with pytest.raises(DataError, match=message):
            open_shards(spec)
    server.handler.serves_ranges = False
    with pytest.raises(DataError, match=r"does not serve ranges"):
        source[0]


def test_http_without_aiohttp_says_what_to_install():
    code = "import sys; sys.modules['aiohttp'] = None; from llava_ds.data.sources.shards import open_shards; "
    code += "open_shards('http://127.0.0.1:1/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"BackendUnavailableError: http://127.0.0.1:1/x.*pip install", last)


def test_the_fingerprint_follows_shards_and_seed(tmp_path):
    out, _ = _write(tmp_path)
    prints = [open_shards(str(out)).fingerprint for _ in range(2)] + [open_shards(str(out), seed=1).fingerprint]
    os.utime(out / "train-000001.tar", ns=(1, 1))
    prints.append(open_shards(str(out)).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("with_index", [True, False])
def test_mutated_shards_give_samples_or_data_errors(tmp_path, with_index):
    out, _ = _write(tmp_path, count=5, samples_per_shard=5)
    rng = random.Random(0)
    outcomes = Counter()
    for trial in range(200):
        folder = tmp_path / f"f{trial}"
        folder.mkdir()
        for name in ("train-000000.tar", "train-000000.tar.index.json")[: 1 + with_index]:
            content = bytearray((out / name).read_bytes())
            if name.endswith(".json") == (with_index and rng.random() < 0.7):
                for _ in range(rng.randint(1, 4)):
                    content[rng.randrange(len(content) * 7 // 10)] = rng.choice(
                        [rng.randrange(256), rng.randrange(48, 58)]
                    )
                if rng.random() < 0.1:
                    del content[rng.randrange(len(content)) :]
            (folder / name).write_bytes(content)
        try:
            for number in range(len(source := open_shards(str(folder)))):
                try:
                    sample = source[number]
                    assert isinstance(sample, Sample)
                    outcomes["good"] += all(isinstance(image.read(), bytes) for image in sample.images)
                except DataError:
                    outcomes["bad sample"] += 1
        except DataError:
            outcomes["bad shard"] += 1
    assert outcomes["good"] > 100
    assert outcomes["bad shard"] + outcomes["bad sample"] > 30


def test_the_tool(tmp_path):
    samples = _samples(tmp_path, 4)
    records = [
        {
            "id": s.id,
            "image": [f"{n}_{k}.x" for k in range(len(s.images))],
            "conversations": [{"from": "human", "value": s.turns[0].text}, {"from": "gpt", "value": "Ho"}],
        }
        for n, s in enumerate(samples)
    ]
    (tmp_path / "data.json").write_text(json.dumps([*records, {"id": "bad"}]))
    script = [str(REPO / "tools/make_shards"), str(tmp_path / "data.json"), str(tmp_path / "out")]
    options = ["--samples-per-shard", "2", "--on-bad-sample", "skip"]
    done = subprocess.run(
        [sys.executable, *script, *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr
    assert "skipped 1: 'conversations' is no list" in done.stdout
    assert "4 samples with 4 images in 2 shard(s)" in done.stdout
    assert "5/5" in done.stderr  # the progress bar
    assert _content(open_shards(str(tmp_path / "out"))) == _content(samples)
    (again,) = run_scripts([Script(script, clean_environ())])
    assert again.returncode == 1 and "ConfigError: " in again.stderr and "not an empty folder" in again.stderr


def test_names_with_a_dot_in_their_key_are_left_aside_and_said(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("one.json", "photo.v2.json", "photo.v2.jpg", "one.cls"):
            content = b"{}" if name == "one.json" else b"x"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert len(open_shards(str(tmp_path / "a.tar"))) == 1
    assert "left aside 2 member(s) of a shard, the first 'photo.v2.json'" in capsys.readouterr().err


def test_a_tar_that_is_not_listed_is_named(tmp_path):
    out, _ = _write(tmp_path)
    (out / "other.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 \.tar that shards.json does not list, the first other.tar"):
        open_shards(str(out))
