"""Logs of many ranks in one view: exact order, few open files, flat memory."""

import random
import resource
import tracemalloc
from datetime import datetime, timedelta

import pytest

from llava_ds.cluster import log_view, rank_logs
from llava_ds.cluster.log_view import ShownLine, follow_log, format_line, join_alike, read_log
from llava_ds.cluster.rank_logs import LogLine, RankLog, find_logs, format_ranks, merged_lines
from llava_ds.errors import ConfigError

BASE = datetime(2026, 11, 25, 13)


def _stamp(seconds: float) -> str:
    return (BASE + timedelta(seconds=seconds)).isoformat(timespec="microseconds")


def _log(folder, rank, *lines, end="\n"):
    """A log of (seconds, text), or of text alone for a line without a stamp."""
    raw = [line if isinstance(line, str) else f"{_stamp(line[0])} {line[1]}" for line in lines]
    file = folder / f"rank-{rank:05d}.log"
    file.write_bytes(("\n".join(raw) + (end if raw else "")).encode())
    return file


def _texts(lines):
    return [(line.rank, line.text) for line in lines]


@pytest.fixture
def few_files():
    """At most 256 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_lines_stand_by_time_then_by_rank(tmp_path):
    _log(tmp_path, 0, (1, "a"), (3, "d"), (3, "e"))
    _log(tmp_path, 1, (2, "b"), (3, "f"))
    _log(tmp_path, 10, (2.5, "c"), (3, "g"))
    lines = list(merged_lines(tmp_path))
    assert _texts(lines) == [(0, "a"), (1, "b"), (10, "c"), (0, "d"), (0, "e"), (1, "f"), (10, "g")]
    assert lines[2] == LogLine("2026-11-25T13:00:02.500000", 10, "c")


def test_only_some_ranks(tmp_path):
    for rank in range(5):
        _log(tmp_path, rank, (rank, f"of {rank}"))
    assert _texts(merged_lines(tmp_path, [3, 1, 3])) == [(1, "of 1"), (3, "of 3")]
    with pytest.raises(ConfigError, match=r"rank-00007.log: no such log; there are those of ranks 0-4"):
        merged_lines(tmp_path, [3, 9, 7])


def test_a_line_without_a_stamp_stays_with_the_line_before(tmp_path):
    _log(tmp_path, 0, "before 1", "before 2", (1, "Traceback"), "  File", "", "Error", (3, "end"))
    _log(tmp_path, 1, (1, "x"), (2, "y"), "  of y")
    assert _texts(merged_lines(tmp_path)) == [
        (0, "before 1"), (0, "before 2"), (0, "Traceback"), (0, "  File"), (0, ""), (0, "Error"),
        (1, "x"), (1, "y"), (1, "  of y"), (0, "end"),
    ]
    assert [line.time_text for line in merged_lines(tmp_path, [0])] == ["", "", *[_stamp(1)] * 4, _stamp(3)]


def test_a_clock_that_goes_back_does_not_reorder_its_own_file(tmp_path):
    _log(tmp_path, 0, (5, "a"), (3, "b"), (3.5, "c"), (6, "d"))
    _log(tmp_path, 1, (4, "w"), (5, "x"), (5.5, "y"), (7, "z"))
    assert _texts(merged_lines(tmp_path)) == [
        (1, "w"), (0, "a"), (0, "b"), (0, "c"), (1, "x"), (1, "y"), (0, "d"), (1, "z"),
    ]


def test_odd_files(tmp_path):
    _log(tmp_path, 0)
    _log(tmp_path, 1, (1, "naïve 雪 🐈"), (2, "cut o"), end="")
    (tmp_path / "rank-00002.log").write_bytes(f"{_stamp(1.5)} bad \xff\n{_stamp(3)} \n{_stamp(4)}\n".encode("latin-1"))
    (tmp_path / "rank-3.log.old").write_text("not a log\n")
    (tmp_path / "preflight-rank-00004.log").write_text("not of the training\n")
    (tmp_path / "rank-x.log").write_text("not a log\n")
    assert _texts(merged_lines(tmp_path)) == [
        (1, "naïve 雪 🐈"), (2, "bad \N{REPLACEMENT CHARACTER}"), (1, "cut o"), (2, ""), (2, ""),
    ]
    assert list(find_logs(tmp_path)) == [0, 1, 2]
    assert list(merged_lines(tmp_path / "nowhere")) == []


def test_a_progress_bar_shows_what_was_left_of_it(tmp_path):
    bar = "\r 0%|  |\r50%|# |\r100%|##|"
    _log(tmp_path, 0, (1, bar), (2, "windows\r"), (3, f"{bar}\r\r"), "no stamp\rbut a bar")
    assert _texts(merged_lines(tmp_path)) == [(0, "100%|##|"), (0, "windows"), (0, "100%|##|"), (0, "but a bar")]


def test_a_comma_of_another_language_is_the_same_time(tmp_path):
    (tmp_path / "rank-00000.log").write_text(f"{_stamp(1.5).replace('.', ',')} b\n")
    _log(tmp_path, 1, (1.25, "a"), (1.75, "c"))
    assert _texts(merged_lines(tmp_path)) == [(1, "a"), (0, "b"), (1, "c")]


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 4096])
def test_blocks_may_end_anywhere(tmp_path, block_bytes):
    file = _log(tmp_path, 3, (1, "é" * 40), "", "雪", (2, "x\ry"), (3, "end"), end="")
    lines = list(RankLog(file, 3).read_lines(block_bytes))
    assert _texts(lines) == [(3, "é" * 40), (3, ""), (3, "雪"), (3, "y"), (3, "end")]
    assert [line.time_text for line in lines] == [_stamp(1)] * 3 + [_stamp(2), _stamp(3)]


def test_a_line_of_any_length_is_shown_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_logs, "_MAX_LINE_BYTES", 100)
    file = _log(tmp_path, 0, (1, "雪" * 1000), (2, "end"))
    lines = list(RankLog(file, 0).read_lines(block_bytes=64))
    assert "".join(line.text for line in lines) == "雪" * 1000 + "end"
    assert len(lines) > 20
    assert {line.time_text for line in lines[:-1]} == {_stamp(1)}
    assert lines[-1] == LogLine(_stamp(2), 0, "end")
    bar = _log(tmp_path, 1, (1, "\r".join(f"{n}%" for n in range(1000))), (2, "end"))
    shown = [line.text for line in RankLog(bar, 1).read_lines(block_bytes=64)]
    assert shown[-2:] == ["999%", "end"]
    assert all(text.endswith("%") for text in shown[:-1])
    assert 10 < len(shown) < 100


def test_a_thousand_ranks_with_few_open_files(tmp_path, few_files):
    expected = []
    for rank in range(1024):
        clock = random.Random(rank)
        times = sorted(round(clock.uniform(0, 50), 3) for _ in range(40))
        _log(tmp_path, rank, *((at, f"line {number} of {rank}") for number, at in enumerate(times)))
        expected += [(at, rank, number) for number, at in enumerate(times)]
    expected.sort()
    lines = list(merged_lines(tmp_path))
    assert len(lines) == 40_960
    assert lines == [LogLine(_stamp(at), rank, f"line {number} of {rank}") for at, rank, number in expected]
    end = list(read_log(tmp_path, last=10))
    assert end == [ShownLine(_stamp(at), (rank,), f"line {number} of {rank}") for at, rank, number in expected[-10:]]


def test_memory_does_not_grow_with_the_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_logs, "_MAX_BLOCK_BYTES", 1 << 14)

    def peak(num_lines):
        for rank in range(8):
            _log(tmp_path, rank, *((0.01 * number, f"{rank} {number} " + 80 * "x") for number in range(num_lines)))
        tracemalloc.start()
        num_read = sum(1 for _ in read_log(tmp_path))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_read == 8 * num_lines
        return peak_bytes

    small, large = peak(500), peak(2000)  # 0.5 MB and 2 MB of logs: each file is longer than a block
    assert large < 1.2 * small


def test_many_files_share_the_memory_of_their_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_logs, "_ALL_BLOCKS_BYTES", 1 << 19)
    for rank in range(64):
        _log(tmp_path, rank, (1, "x"))
    sizes = set()
    whole = RankLog._read_block
    monkeypatch.setattr(RankLog, "_read_block", lambda log, size: sizes.add(size) or whole(log, size))
    for ranks, expected in ((range(64), 8192), ([0], 1 << 18), ([1, 2, 3], (1 << 19) // 3)):
        sizes.clear()
        assert len(list(merged_lines(tmp_path, ranks))) == len(ranks)
        assert sizes == {expected}


def test_what_ranks_print_alike_stands_once(tmp_path):
    for rank in (*range(8), 9):
        _log(tmp_path, rank, (rank / 10, "loading"), (1 + rank / 10, f"own {rank}") if rank == 3 else (1.5, "loaded"))
    _log(tmp_path, 8, (10, "loading"), (10.5, "loaded"))
    assert list(map(format_line, read_log(tmp_path))) == [
        "2026-11-25 13:00:00.000 [0-7,9] loading",
        "2026-11-25 13:00:01.300 [3] own 3",
        "2026-11-25 13:00:01.500 [0-2,4-7,9] loaded",
        "2026-11-25 13:00:10.000 [8] loading",
        "2026-11-25 13:00:10.500 [8] loaded",
    ]
    each = list(read_log(tmp_path, together=False))
    assert len(each) == 20
    assert each[:2] == [ShownLine(_stamp(0), (0,), "loading"), ShownLine(_stamp(0.1), (1,), "loading")]


def _join(*lines):
    shown = join_alike(LogLine(_stamp(at), rank, text) for at, rank, text in lines)
    return [(line.ranks, line.text) for line in shown]


def test_a_rank_keeps_its_order_and_its_repetitions():
    # Rank 1 printed y before x: its x does not move before its y.
    assert _join((0, 0, "x"), (0.1, 1, "y"), (0.2, 1, "x")) == [((0,), "x"), ((1,), "y"), ((1,), "x")]
    assert _join((0, 1, "y"), (0.1, 0, "x"), (0.2, 0, "y"), (0.3, 1, "x")) == [
        ((1,), "y"), ((0, 1), "x"), ((0,), "y"),
    ]
    assert _join((0, 0, "-"), (0, 0, "-"), (0, 0, "-"), (0.1, 1, "-"), (0.1, 1, "-")) == [
        ((0, 1), "-"), ((0, 1), "-"), ((0,), "-"),
    ]


def test_two_seconds_is_the_most_that_lies_between_them():
    assert _join((0, 0, "x"), (2, 1, "x"), (2.000001, 2, "x")) == [((0, 1), "x"), ((2,), "x")]


def test_logs_without_any_stamp_are_joined_too(tmp_path):
    for rank in range(3):
        _log(tmp_path, rank, "a", "b", *(["own"] if rank == 1 else []))
    shown = [(line.ranks, line.text) for line in read_log(tmp_path)]
    assert shown == [((0, 1, 2), "a"), ((0, 1, 2), "b"), ((1,), "own")]
    assert format_line(next(read_log(tmp_path))) == " " * 24 + "[0-2] a"


def test_few_lines_wait_for_others(monkeypatch):
    monkeypatch.setattr(log_view, "_MAX_WAITING", 3)
    shown = _join(*((0, 0, f"line {number}") for number in range(10)), (0, 1, "line 0"), (0, 2, "line 9"))
    assert shown == [*(((0,), f"line {number}") for number in range(9)), ((0, 2), "line 9"), ((1,), "line 0")]


@pytest.mark.parametrize("together", [True, False])
def test_the_last_lines_are_the_end_of_the_whole(tmp_path, monkeypatch, together):
    monkeypatch.setattr(log_view, "_FIRST_TAIL_BYTES", 128)
    draw = random.Random(1)
    for rank in range(12):
        times = sorted(round(draw.uniform(0, 60), 3) for _ in range(draw.choice([0, 3, 40, 400])))
        lines = []
        for number, at in enumerate(times):
            lines.append((at, draw.choice(["hello", f"step {at:.0f}", f"{rank} {number}"])))
            lines += ["  and on"] if draw.random() < 0.2 else []
        _log(tmp_path, rank, *lines)
    whole = list(read_log(tmp_path, together=together))
    assert len(whole) > 500
    for num in (1, 2, 17, 200, len(whole), len(whole) + 5):
        assert list(read_log(tmp_path, last=num, together=together)) == whole[-num:]


def test_a_line_before_the_ends_that_are_read_first_still_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(log_view, "_FIRST_TAIL_BYTES", 95)
    file = _log(tmp_path, 0, (99.5, "hello"), (100, "a"), (100.6, "b"), (100.7, "c"))
    _log(tmp_path, 1, (100.5, "hello"))
    tail = RankLog.at_tail(file, 0, 95)
    assert (tail.time_text, [line.text for line in tail.read_lines()]) == (_stamp(100), ["a", "b", "c"])
    assert [(line.ranks, line.text) for line in read_log(tmp_path, last=3)] == [((0,), "a"), ((0,), "b"), ((0,), "c")]
    assert RankLog.at_tail(_log(tmp_path, 2, *["no stamp"] * 50), 2, 95).offset == 0


def test_the_last_lines_are_read_from_the_ends_of_files(tmp_path, monkeypatch):
    _log(tmp_path, 0, *((number, f"line {number} " + "x" * 100) for number in range(20_000)))
    _log(tmp_path, 1, (19_998.5, "of one"))
    read = []
    whole = RankLog._read_block
    monkeypatch.setattr(RankLog, "_read_block", lambda log, size: read.append(whole(log, size)) or read[-1])
    lines = list(read_log(tmp_path, last=3))
    assert [line.text[:10] for line in lines] == ["line 19998", "of one", "line 19999"]
    assert 0 < sum(map(len, read)) < 100_000 < (tmp_path / "rank-00000.log").stat().st_size


def test_no_logs_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no rank-\*\.log there"):
        read_log(tmp_path)
    _log(tmp_path, 0)
    assert list(read_log(tmp_path)) == []
    assert list(read_log(tmp_path, last=5)) == []


class _Sleep:
    """Does the next thing each time it is slept, and ends the start after the last."""

    def __init__(self, folder, *deeds):
        self.folder, self.deeds, self.num = folder, list(deeds), 0

    def __call__(self, seconds):
        assert seconds > 0
        self.num += 1
        if self.deeds:
            self.deeds.pop(0)()
        else:
            (self.folder / "end.json").write_text("{}")


def _append(file, text):
    with file.open("a", newline="") as handle:
        handle.write(text)


def test_following_shows_each_line_once_and_ends_with_the_start(tmp_path):
    first = _log(tmp_path, 0, (1, "a"), (2, "half"), end="")
    later = tmp_path / "rank-00001.log"
    sleep = _Sleep(
        tmp_path,
        lambda: _append(first, f" whole\n{_stamp(5)} all\n"),
        lambda: None,
        lambda: _append(later, f"{_stamp(4)} of one\n{_stamp(6)} all\n"),
        lambda: (_append(first, f"{_stamp(8)} all\n"), _append(later, f"{_stamp(7)} all\n  mo")),
        lambda: _append(later, "re"),
    )
    shown = [(line.ranks, line.text) for line in follow_log(tmp_path, sleep=sleep)]
    assert shown == [
        ((0,), "a"), ((0,), "half whole"), ((0,), "all"), ((1,), "of one"), ((1,), "all"),
        ((0, 1), "all"), ((1,), "  more"),
    ]
    assert sleep.num == 6


def test_following_from_the_last_lines_of_ranks_that_may_come_later(tmp_path):
    file = _log(tmp_path, 0, *((number, f"line {number}") for number in range(100)))
    _append(file, f"{_stamp(150)} ha")
    _log(tmp_path, 1, (50, "another"))
    sleep = _Sleep(
        tmp_path, lambda: _append(file, f"lf\n{_stamp(200)} new\n"), lambda: _log(tmp_path, 7, (201, "seven"))
    )
    shown = [(line.ranks, line.text) for line in follow_log(tmp_path, [0, 7], last=2, sleep=sleep)]
    assert shown == [((0,), "line 98"), ((0,), "line 99"), ((0,), "half"), ((0,), "new"), ((7,), "seven")]


def test_following_a_start_that_is_over(tmp_path):
    _log(tmp_path, 0, (1, "a"), (2, "cut"), end="")
    (tmp_path / "end.json").write_text("{}")
    assert [line.text for line in follow_log(tmp_path, sleep=pytest.fail)] == ["a", "cut"]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([], ""), ([3], "3"), ([0, 1], "0-1"), ([9, 0, 1, 2, 3, 4, 5, 6, 7], "0-7,9"), ([5, 5, 3, 1], "1,3,5"),
     (range(1024), "0-1023")],
)
def test_ranges_of_ranks(ranks, text):
    assert format_ranks(ranks) == text
