"""A JSONL file gives exactly its lines, whatever its ends of lines, and never those of another file or index."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from llava_ds.cache import cache_folder
from llava_ds.data.sources import jsonl
from llava_ds.data.sources.jsonl import open_jsonl, parse_line
from llava_ds.errors import DataError

BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_DS_CACHE", str(tmp_path / "cache"))


def _write(folder, data: bytes, name="train.jsonl"):
    path = folder / name
    path.write_bytes(data)
    return path


def _open(path, chunk_bytes=1 << 20):
    """The file and what was said."""
    said = []
    return open_jsonl(path, said.append, chunk_bytes), said


def _expected(data: bytes):
    """(line number, record) of every record, by splitting the whole text."""
    lines = data.removeprefix(BOM).split(b"\n")
    return [(n, line.removesuffix(b"\r")) for n, line in enumerate(lines, 1) if line.strip(b" \t\r\n")]


def _found(file):
    return [(file.line_number(k), file[k]) for k in range(len(file))]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 4, 7, 1 << 20])
@pytest.mark.parametrize(
    ("data", "records"),
    [
        (b"1", [(1, b"1")]),
        (b"1\n", [(1, b"1")]),
        (b"1\n2", [(1, b"1"), (2, b"2")]),
        (b"1\r\n2\r\n", [(1, b"1"), (2, b"2")]),
        (b"1\r\n2\r", [(1, b"1"), (2, b"2")]),
        (b"1\r\r\n", [(1, b"1\r")]),
        (b"\n\n1\n\n\n2\n\n", [(3, b"1"), (6, b"2")]),
        (b"\r\n \t\r\n1\n   \n2\n  ", [(3, b"1"), (5, b"2")]),
        (b"  1  \n\t2", [(1, b"  1  "), (2, b"\t2")]),
        (BOM + b"1\n2\n", [(1, b"1"), (2, b"2")]),
        (BOM + b"\n1", [(2, b"1")]),
        (b"1\n" + BOM + b"2\n", [(1, b"1"), (2, BOM + b"2")]),
        (BOM[:2], [(1, BOM[:2])]),
        (b"\0\n\0\0\n", [(1, b"\0"), (2, b"\0\0")]),
        (b"\x0b\n\x0c\n\x1c\n\xc2\x85\n", [(1, b"\x0b"), (2, b"\x0c"), (3, b"\x1c"), (4, b"\xc2\x85")]),
        ("\u732b \u2028\u2029\x85\n\xfc".encode(), [(1, "\u732b \u2028\u2029\x85".encode()), (2, b"\xc3\xbc")]),
        (b"x" * 50 + b"\n" + b" " * 50 + b"\n" + b" " * 50 + b"y", [(1, b"x" * 50), (3, b" " * 50 + b"y")]),
        (b"123\n567\n", [(1, b"123"), (2, b"567")]),
    ],
)
def test_odd_files_give_exactly_their_records(tmp_path, data, records, chunk_bytes):
    path = _write(tmp_path, data)
    file, _ = _open(path, chunk_bytes)
    assert _found(file) == records == _expected(data)
    assert file.fingerprint == hashlib.sha256(data).hexdigest()
    assert _found(_open(path)[0]) == records
    assert list(file) == [record for _, record in records]


def test_random_files_give_the_records_of_a_plain_split(tmp_path):
    rng = random.Random(0)
    pieces = [b"\n", b"\n", b"\r\n", b"\r", b" ", b"\t", b"{}", b"ab", b"\0", b"\x0b", b"\xc3\xa9", BOM, b"long" * 9]
    num_records = num_blank = 0
    for number in range(600):
        data = b"".join(rng.choices(pieces, k=rng.randrange(1, 60)))
        path = _write(tmp_path, data, f"{number}.jsonl")
        expected = _expected(data)
        if not expected:
            with pytest.raises(DataError, match="no record|is empty"):
                _open(path, rng.randint(1, 64))
            continue
        file, said = _open(path, rng.randint(1, 64))
        assert _found(file) == expected
        assert file.fingerprint == hashlib.sha256(data).hexdigest()
        blank = len(data.removeprefix(BOM).removesuffix(b"\n").split(b"\n")) - len(expected)
        assert said[-1].endswith(f"blank lines: {blank}")
        again, said = _open(path)
        assert not said and _found(again) == expected
        num_records += len(expected)
        num_blank += blank
    assert num_records > 3000 and num_blank > 1000


def test_the_ends_of_a_file_and_other_numbers(tmp_path):
    file, _ = _open(_write(tmp_path, b"a\n\nb\nc\n"))
    assert [file[-1], file[-3], file.line_number(-1), file.where(1)] == [b"c", b"a", 4, "train.jsonl:3"]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"3 records, got index {index}"):
            file[index]
        with pytest.raises(IndexError):
            file.line_number(index)
    with pytest.raises(TypeError):
        file["a"]


def test_the_second_open_trusts_the_index_and_does_not_read_the_data(tmp_path, monkeypatch):
    path = _write(tmp_path, b"1\n\n2\n")
    first, said = _open(path)
    assert (tmp_path / "train.jsonl.index").is_file() and len(said) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl", "train.jsonl.index"]
    monkeypatch.setattr(jsonl, "_scan", None)
    second, said = _open(path)
    assert said == [] and second.fingerprint == first.fingerprint and _found(second) == [(1, b"1"), (3, b"2")]


@pytest.mark.parametrize("data", [b"1\n22\n3\n", b"9\n2\n", b"111\n"])
def test_an_index_of_other_data_is_built_again(tmp_path, data):
    path = _write(tmp_path, b"1\n2\n")
    os.utime(path, ns=(1, 1))
    _open(path)
    path.write_bytes(data)
    os.utime(path, ns=(2, 2))
    file, said = _open(path)
    assert len(said) == 2 and _found(file) == _expected(data)
    assert file.fingerprint == hashlib.sha256(data).hexdigest()
    assert _open(path)[1] == []


def _header(whole, **changes):
    record = json.loads(whole[:512].rstrip(b"\0")) | changes
    return (json.dumps(record).encode() + b"\n").ljust(512, b"\0") + whole[512:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:100],
        lambda whole: whole[:512],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: bytes(len(whole)),
        lambda whole: os.urandom(len(whole)),
        lambda whole: b"[" * len(whole),
        lambda whole: whole.replace(b'"num_lines": 3', b'"num_lines": x'),
        lambda whole: _header(whole, llava_ds_jsonl_index=2),
        lambda whole: _header(whole, num_lines="3"),
        lambda whole: _header(whole, num_lines=2),
        lambda whole: _header(whole, size_bytes=4),
        lambda whole: _header(whole, more=1),
    ],
)
def test_a_damaged_index_is_built_again(tmp_path, damage):
    path = _write(tmp_path, b"1\n\n2\n")
    _open(path)
    index = tmp_path / "train.jsonl.index"
    whole = index.read_bytes()
    assert len(whole) == 512 + 8 * (4 + 1) and _header(whole) == whole
    index.write_bytes(damage(whole))
    file, said = _open(path)
    assert len(said) == 2 and _found(file) == [(1, b"1"), (3, b"2")]
    assert index.read_bytes() == whole


def test_wrong_bounds_inside_an_index_are_an_error_and_never_another_text(tmp_path):
    data = b"".join(b"%d%s\n" % (n, b"x" * (n % 7)) for n in range(40))
    path = _write(tmp_path, data)
    _open(path)
    index = tmp_path / "train.jsonl.index"
    whole = index.read_bytes()
    rng = random.Random(0)
    num_errors = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(512, len(whole))] ^= 1 << rng.randrange(8)
        index.write_bytes(damaged)
        file, said = _open(path)
        assert said == []
        for k, (_, record) in enumerate(_expected(data)):
            try:
                assert file[k] == record
            except DataError as error:
                assert f"train.jsonl:{k + 1}: the file has changed" in str(error) and str(index) in str(error)
                num_errors += 1
    assert num_errors >= 300


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(tmp_path, monkeypatch):
    path = _write(tmp_path, b"1\n2\n")
    (tmp_path / "train.jsonl.index").mkdir()  # root may write everywhere, but over no folder
    file, said = _open(path)
    assert _found(file) == [(1, b"1"), (2, b"2")] and "a folder has its name" in said[1]
    assert [p.suffix for p in (cache_folder() / "jsonl").iterdir()] == [".index"]
    assert _open(path)[1] == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl.index").mkdir()
    assert _found(_open(_write(other, b"3"))[0]) == [(1, b"3")]
    assert _found(_open(path)[0]) == [(1, b"1"), (2, b"2")]
    monkeypatch.setenv("LLAVA_DS_CACHE", str(path))  # a file
    with pytest.raises(DataError, match=r"index cannot be written \(.*a folder.*; .*Not a dir.*set LLAVA_DS_CACHE"):
        _open(path)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    path = _write(tmp_path, b"1\n2\n")
    places = []

    def refuse(descriptor):
        places.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl.os, "fsync", refuse)
    with pytest.raises(DataError, match="No space left on device; .*No space left on device"):
        _open(path)
    assert len(places) == 2
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["train.jsonl"]


def test_no_home_and_no_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAVA_DS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llava_ds"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"train.jsonl: cannot be read \(No such file"),
        (b"", "the file is empty; give a JSONL file"),
        (BOM, r"no record \(3 bytes, 0 lines, all blank\)"),
        (b"\n \r\n\t", r"no record \(5 bytes, 3 lines, all blank\)"),
    ],
)
def test_a_file_without_records_is_an_error(tmp_path, data, message):
    path = tmp_path / "train.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        _open(path)
    assert not (tmp_path / "train.jsonl.index").exists()


def test_what_is_no_readable_file(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="a folder; give a JSONL file"):
        _open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        _open(tmp_path / "pipe")
    path = _write(tmp_path, b"1\n")
    _open(path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read \(Permission denied\)"):
        _open(path)


def test_a_disk_that_fails_is_not_taken_for_one_that_cannot_be_written(tmp_path, monkeypatch):
    path = _write(tmp_path, b"1\n2\n")
    file, _ = _open(path)
    (tmp_path / "train.jsonl.index").unlink()

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(jsonl.os, "pread", fail)
    with pytest.raises(DataError, match=r"Input/output error.*look at its disk"):
        _open(path)
    file._tables = lambda: ([0, 2, 4], [])
    with pytest.raises(DataError, match=r"train.jsonl:2: cannot be read \(Input/output error\)"):
        file[1]


def test_a_file_that_grows_while_it_is_indexed_is_refused(tmp_path):
    path = _write(tmp_path, b"1\n2\n")

    def append(_):
        with path.open("ab") as file:
            file.write(b"3\n")

    with pytest.raises(DataError, match=r"changed while it was indexed: .*\(4, .*now \[\(6, .*wait until it is"):
        open_jsonl(path, append)
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_file_that_is_replaced_while_it_is_indexed_is_refused(tmp_path, monkeypatch):
    path = _write(tmp_path, b"1\n2\n")
    read = os.pread

    def replace(*arguments):
        other = _write(tmp_path, b"8\n9\n", "other")
        os.utime(other, ns=(7, 7))
        other.replace(path)
        return read(*arguments)

    monkeypatch.setattr(jsonl.os, "pread", replace)
    with pytest.raises(DataError, match="changed while it was indexed"):
        _open(path)


def test_a_read_that_ends_early_is_not_taken_for_the_end(tmp_path, monkeypatch):
    path = _write(tmp_path, b"1\n2\n")
    read = os.pread
    monkeypatch.setattr(jsonl.os, "pread", lambda fd, size, position: read(fd, size, position) if position < 2 else b"")
    with pytest.raises(DataError, match=r"changed while it was indexed: .*now \[\(2, "):
        _open(path, 2)


def test_memory_stays_flat_while_a_file_is_indexed(tmp_path, monkeypatch):
    class SlowHash:
        def __init__(self, _):
            self.update = lambda chunk: time.sleep(0.005)
            self.hexdigest = lambda: "0"

    path = _write(tmp_path, b"1\n" * (8 << 20))
    monkeypatch.setattr(jsonl, "_cached_index", lambda path: path)  # it hashes a name
    monkeypatch.setattr(jsonl.hashlib, "sha256", SlowHash)
    tracemalloc.start()
    try:
        file, _ = _open(path, 1 << 17)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(file) == 8 << 20 and peak_bytes < 4 << 20


@pytest.mark.parametrize(
    ("data", "how"),
    [
        (b"10\n20", "expected 3 bytes at 6, got 0"),
        (b"10\n20\n3", "expected 3 bytes at 6, got 1"),
        (b"1\n2\n3\n4\n5", "are no longer one line"),
        (b"10\n2034\n\n", "are no longer one line"),
        (b"10\n20\n340", "are no longer one line"),
    ],
)
def test_a_file_that_changes_later_is_an_error_with_its_place(tmp_path, data, how):
    path = _write(tmp_path, b"10\n20\n34\n")
    os.utime(path, ns=(1, 1))
    file, unread = _open(path)[0], _open(path)[0]
    assert file[0] == b"10"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"train.jsonl:3: the file has changed .*{how}") as caught:
        file[2]
    assert caught.value.reason == "a JSONL file has changed since it was indexed"
    with pytest.raises(DataError, match=r"train.jsonl:1: .*size in bytes and time in ns were \(9, 1\), now"):
        unread[0]


def test_an_index_that_is_replaced_or_removed_later(tmp_path):
    path = _write(tmp_path, b"10\n20\n")
    os.utime(path, ns=(1, 1))
    file = _open(path)[0]
    kept = pickle.dumps(file)
    assert file[1] == b"20"
    path.write_bytes(b"1\n2\n34\n")
    _open(path)
    with pytest.raises(DataError, match="index of .* has changed since; start again"):
        pickle.loads(kept)[0]
    (tmp_path / "train.jsonl.index").unlink()
    with pytest.raises(DataError, match="index cannot be read .*No such file.*start again"):
        pickle.loads(kept)[0]


def test_it_pickles_without_what_is_open(tmp_path):
    data = b"".join(b"%d\n" % n for n in range(2000))
    file, _ = _open(_write(tmp_path, data))
    assert file[1999] == b"1999"
    kept = pickle.dumps(file)
    assert len(kept) < 1000
    assert _found(pickle.loads(kept)) == _expected(data)


def _read_all(file, expected, results):
    results.put((_found(file) == expected, file._opened))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_and_threads_read_the_same_file_at_once(tmp_path, method):
    data = b"".join(b"%d\n" % n + b"\n" * (n % 3 == 0) for n in range(500))
    file, _ = _open(_write(tmp_path, data))
    assert _found(file) == _expected(data)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    children = [context.Process(target=_read_all, args=(file, _expected(data), results)) for _ in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(4) as threads:
        assert [k.result() for k in [threads.submit(_found, file) for _ in range(4)]] == [_expected(data)] * 4
    answers = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert [is_equal for is_equal, _ in answers] == [True, True]
    assert {pid for _, (pid, _) in answers} == {child.pid for child in children}
    assert file._opened[0] == os.getpid()


def _open_at_once(path, barrier, results):
    barrier.wait()
    file, _ = _open(path, 64)
    results.put((file.fingerprint, len(file), file[-1]))


def test_four_processes_open_a_new_file_at_once(tmp_path):
    data = b"".join(b"%d\n" % n for n in range(20000))
    path = _write(tmp_path, data)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    children = [context.Process(target=_open_at_once, args=(path, barrier, results)) for _ in range(4)]
    for child in children:
        child.start()
    assert {results.get(timeout=60) for _ in children} == {(hashlib.sha256(data).hexdigest(), 20000, b"19999")}
    for child in children:
        child.join()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl", "train.jsonl.index"]
    assert _open(path)[1] == []


def test_no_file_stays_open(tmp_path):
    def num_open():
        return len(os.listdir("/proc/self/fd"))

    path = _write(tmp_path, b"1\n2\n")
    before = num_open()
    for _ in range(20):
        assert _open(path)[0][1] == b"2"
    file = _open(path)[0]
    os.utime(path, ns=(1, 1))
    for _ in range(20):
        with pytest.raises(DataError):
            file[0]
    del file
    assert num_open() == before


def test_lines_become_values():
    assert parse_line('{"id": "\u732b", "a": null}'.encode(), "x:1") == {"id": "\u732b", "a": None}
    assert parse_line(b" 1 ", "x:1") == 1


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b'{"id": 1', r"^t.jsonl:17:9: not valid JSON: Expecting ',' delimiter, near '{\"id\": 1'; every", "JSON"),
        (b"[1] 2", "^t.jsonl:17:5: not valid JSON: Extra data", "JSON"),
        (b"\0a\0b", "^t.jsonl:17:1: not valid JSON", "JSON"),
        (b"a\xff", "^t.jsonl:17:2: not UTF-8 text: invalid start byte", "UTF-8"),
        ('"\xfc"'.encode("utf-16"), "^t.jsonl:17:1: not UTF-8 text", "UTF-8"),
        (b"9" * 5000, "^t.jsonl:17: not valid JSON: Exceeds the limit", "JSON"),
        (b"[" * 100000, "^t.jsonl:17: not valid JSON: maximum recursion", "JSON"),
    ],
)
def test_a_line_that_is_no_json_is_an_error_with_its_place(line, message, reason):
    with pytest.raises(DataError, match=message) as caught:
        parse_line(line, "t.jsonl:17")
    assert reason in caught.value.reason and "17" not in caught.value.reason
    assert len(str(caught.value)) < 300
