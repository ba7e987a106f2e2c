"""The table of runs: exact lines of whole, odd and broken runs, and the history of one."""

import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from llava_ds.cluster.history import explain_starts, find_start
from llava_ds.cluster.overview import RunLine, find_runs, read_overview
from llava_ds.cluster.run_files import RunFiles, read_last_lines, to_number
from llava_ds.cluster.run_table import format_duration, format_table, shorten, text_width
from llava_ds.cluster.slurm_queue import NOT_QUEUED
from llava_ds.errors import ConfigError
from llava_ds.starts import End, Failure, begin_start, note_failure, write_end

ROOT = Path(__file__).parents[2]
NOW = 1_800_000_000.0


def _write_run(run_dir, num_steps=100, steps=0, age_s=10.0, **record):
    """A run folder with so many lines of metrics, the last of them ``age_s`` old."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps({"num_steps": num_steps, "resumed": []} | record))
    lines = [
        {"step": step, "loss": 8 / step, "samples_per_s": 30 + step % 3, "step_s": 2.0 if step % 5 else 40.0}
        for step in range(1, steps + 1)
    ]
    if steps:
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _age(run_dir, age_s)
    return run_dir


def _age(run_dir, age_s):
    for file in (*run_dir.glob("*.json*"), *run_dir.glob("starts/*/start.json")):
        os.utime(file, (NOW - age_s, NOW - age_s))


def _start(run_dir, end=None, failures=(), **facts):
    folder = begin_start(run_dir, {"num_ranks": 16, **facts})
    for failure in failures:
        note_failure(folder, failure)
    if end:
        write_end(folder, end)
    _age(run_dir, 10.0)
    return folder


def _line(folder, states=None, name=None) -> RunLine:
    lines = read_overview(folder, lambda jobs: states or {}, NOW)
    return lines[0] if name is None else next(line for line in lines if line.name == name)


def test_a_run_that_is_running(tmp_path):
    run = _write_run(tmp_path / "runs" / "stage1", steps=50, age_s=7)
    _start(run, End("stopped", "a signal", 20, "requeue", "it was stopped"), job="4711")
    _start(run, job="4711", restart=1)
    _age(run, 7)
    asked = []
    lines = read_overview(tmp_path / "runs", lambda jobs: asked.append(list(jobs)) or {"4711": "RUNNING"}, NOW)
    assert asked == [["4711"]]
    assert lines == [
        RunLine(
            name="stage1", state="running", step=50, num_steps=100, loss=0.16, samples_per_s=31.0, left_s=100.0,
            quiet_s=7.0, silent=False, restarts=1, job="4711", slurm="RUNNING", error=None, broken=(),
        )
    ]


def _state(tmp_path, slurm=None, end=None, failures=(), job="7", **how):
    run = _write_run(tmp_path / "run", steps=10, **how)
    _start(run, end, failures, **({"job": job} if job else {}))
    state = _line(run, {"7": slurm} if slurm else {}).state
    shutil.rmtree(run)
    return state


def test_the_state_is_what_the_last_start_and_slurm_say(tmp_path):
    def state(*arguments, **options):
        return _state(tmp_path, *arguments, **options)

    own = Failure(3, "ValueError", "no", host="n")
    assert state("RUNNING") == state("COMPLETING") == state() == "running"
    assert state("PENDING (BeginTime)") == "queued again"  # Slurm itself requeued it
    assert state(NOT_QUEUED) == state("NODE_FAIL") == "lost"
    assert state("RUNNING", failures=[own]) == "running"  # its batch script has not said what follows
    assert state(NOT_QUEUED, failures=[own]) == state(failures=[own], job=None) == "failed"
    assert state(failures=[Failure(3, "Hang", "stands still")]) == "hung"
    for reason in ("finished", "stopped", "failed", "hung", "lost"):
        assert state(None, End(reason)) == state(NOT_QUEUED, End(reason, decision="stop")) == reason
    again = End("failed", decision="requeue")
    assert state(None, again) == state("PENDING", again) == state("RUNNING", again) == "queued again"
    assert state("CANCELLED", again) == state(NOT_QUEUED, again) == "failed"
    assert state(NOT_QUEUED, replace(again, decision="resubmit")) == "queued again"  # as another job
    assert state("PENDING", End("stopped")) == "queued again"
    assert state("RUNNING", End("finished", decision="done")) == "finished"
    assert state("PENDING", End("failed", decision="stop")) == "failed"


def test_a_run_without_starts(tmp_path):
    (tmp_path / "new" / "starts").mkdir(parents=True)
    _write_run(tmp_path / "whole", steps=100, age_s=1e6)
    _write_run(tmp_path / "fresh", steps=40, resumed=[{"step": 1}, {"step": 2}])
    _write_run(tmp_path / "old", steps=40, age_s=400)
    marked = _write_run(tmp_path / "marked", steps=40)
    (marked / "FINISHED").write_text("40\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    lines = read_overview(tmp_path, lambda jobs: {}, NOW)
    assert [(line.name, line.state, line.restarts) for line in lines] == [
        ("bad", "?", 0), ("fresh", "running", 2), ("marked", "finished", 0), ("new", "not started", 0),
        ("old", "lost", 0), ("whole", "finished", 0),
    ]
    assert [line.name for line in lines if line.silent or line.quiet_s is not None] == ["fresh"]


def test_a_dead_process_of_this_machine_is_lost(tmp_path):
    run = _write_run(tmp_path / "run", steps=10)
    _start(run)
    done = subprocess.Popen(["true"])
    done.wait()
    for holder, state in [
        ({"host": socket.gethostname(), "pid": done.pid}, "lost"),
        ({"host": socket.gethostname(), "pid": os.getpid()}, "running"),
        ({"host": "elsewhere", "pid": done.pid}, "running"),
        ({}, "running"),
    ]:
        (run / "lock").write_text(json.dumps(holder))
        assert _line(run).state == state
    (run / "FINISHED").write_text("100\n")
    assert _line(run).state == "finished"
    (run / "FINISHED").unlink()
    (run / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": done.pid}))  # of the start before
    _start(run, job="7")
    assert _line(run).state == "running"


@pytest.mark.parametrize(("age_s", "silent"), [(299, False), (301, True)])
def test_a_run_that_claims_to_run_but_is_silent_shows_it(tmp_path, age_s, silent):
    run = _write_run(tmp_path / "run", steps=50)
    _start(run, job="7")
    _age(run, age_s)
    line = _line(run, {"7": "RUNNING"})
    assert (line.state, line.quiet_s, line.silent) == ("running", age_s, silent)
    assert f"{age_s // 60}m{age_s % 60:02d}s{' (silent)' if silent else ''}" in format_table([line])[1]


def test_slow_steps_and_a_start_that_loads_are_not_silent(tmp_path):
    run = _write_run(tmp_path / "run", steps=50)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"step_s": 2.0', '"step_s": 60.0'))
    folder = _start(run, job="7")
    _age(run, 599)
    assert not _line(run).silent
    _age(run, 601)
    assert _line(run).silent
    os.utime(folder / "start.json", (NOW - 20, NOW - 20))  # no line yet since it began
    assert (_line(run).silent, _line(run).quiet_s) == (False, 20.0)
    os.utime(folder / "start.json", (NOW + 20, NOW + 20))  # a clock that is ahead
    assert _line(run).quiet_s == 0.0


def test_the_last_error_is_the_root_of_the_last_start_that_failed(tmp_path):
    run = _write_run(tmp_path / "run")
    peer = Failure(0, "PeerFailedError", "rank 3 is gone", of_peer=True, host="node1", time=1.0)
    root = Failure(3, "ValueError", "first\n  second\tline \x1b[31mred", host="node2", time=2.0)
    _start(run, End("lost", "a machine is gone"), job="7")
    assert _line(run).error == "lost: a machine is gone"
    _start(run, End("failed", "x"), [peer, root], job="7")
    assert _line(run).error == "rank 3 on node2: ValueError: first second line ?[31mred"
    _start(run, End("stopped", "by a signal"), job="7")
    _start(run, job="7")
    assert _line(run).error == "start 2, rank 3 on node2: ValueError: first second line ?[31mred"
    assert _line(run).restarts == 3
    shutil.rmtree(run / "starts" / "0002")
    assert _line(run).error == "start 1, lost: a machine is gone"


def test_runs_are_found_one_and_two_levels_deep(tmp_path):
    for name in ("b", "a", "pipeline/z", "pipeline/deep/er", ".hidden", "a/inner", "pipeline/checkpoints/step-1"):
        _write_run(tmp_path / name)
    for step in (tmp_path / "a" / "checkpoints" / "step-00000004", tmp_path / "copied"):
        step.mkdir(parents=True)
        for name in ("run.json", "step.json"):
            (step / name).write_text("{}")
    (tmp_path / "started" / "starts").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latest").symlink_to("b")
    outside = _write_run(tmp_path.parent / f"{tmp_path.name}-outside")
    (tmp_path / "link").symlink_to(outside)

    def found(folder):
        return [line.name for line in read_overview(folder, lambda jobs: {}, NOW)]

    assert found(tmp_path) == ["a", "b", "link", "pipeline/z", "started"]
    assert found(tmp_path / "pipeline") == ["deep/er", "z"]
    assert found(tmp_path / "a") == ["a"]
    assert found(tmp_path / "a" / "checkpoints") == []
    assert found(tmp_path / "nowhere") == []
    assert find_runs(tmp_path / "file") == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x00" * 4096, b"[1, 2]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"num_steps": "many"}']
)
def test_broken_files_never_end_the_table(tmp_path, content):
    run = _write_run(tmp_path / "bad", steps=3)
    folder = _start(run, End("failed"), [Failure(1, "ValueError", "no", host="n")], job="7")
    _write_run(tmp_path / "good", steps=100)
    for file in (run / "run.json", folder / "start.json", folder / "end.json", folder / "failed-00001.json"):
        file.write_bytes(content)
    (run / "metrics.jsonl").write_bytes(content + b"\n")
    (run / "lock").write_bytes(content)
    (folder / "failed-00002.json").mkdir()
    bad, good = read_overview(tmp_path, lambda jobs: {}, NOW)
    assert (bad.state, bad.step, bad.num_steps, bad.loss, bad.left_s, bad.job) == ("?", None, None, None, None, None)
    assert {"starts/0001/end.json", "starts/0001/failed-00001.json", "starts/0001/failed-00002.json"} <= set(bad.broken)
    assert (good.state, good.loss, good.broken) == ("finished", 0.08, ())
    head, row, _ = format_table([bad, good])
    if b"num_steps" not in content:
        assert {"run.json", "metrics.jsonl", "starts/0001/start.json"} <= set(bad.broken)
        assert row.split()[:5] == ["bad", "?", "?/?", "?", "?"]
    assert "cannot be read: " in row
    assert list(explain_starts(run))[-1].startswith("cannot be read: ")


def test_files_of_the_wrong_kind_never_end_the_table(tmp_path):
    run = tmp_path / "run"
    for name in ("metrics.jsonl", "starts/0001/end.json", "starts/0001/start.json", "starts/0003/end.json"):
        (run / name).mkdir(parents=True)
    (run / "starts" / "0002").write_text("")
    (run / "starts" / "0004x").mkdir()
    (run / "checkpoints").write_text("")
    line = _line(run)
    assert (line.state, line.restarts, line.job) == ("?", 1, None)
    assert line.broken == (
        "starts/0001/start.json", "starts/0001/end.json", "starts/0003/end.json", "metrics.jsonl",
    )


def test_a_start_folder_without_a_word(tmp_path):
    run = _write_run(tmp_path / "run", steps=3)
    (run / "starts" / "0001").mkdir(parents=True)
    line = _line(run)
    assert (line.state, line.job, line.restarts, line.broken) == ("running", None, 0, ())
    assert list(explain_starts(run))[1:] == [
        "start 1: no job on ?, ? ranks, ?", "  no end is known: it runs, or was lost",
    ]


def test_starts_are_in_the_order_of_their_numbers(tmp_path):
    names = ["0010", "10000", "9999", "0002", "0100"]
    for name in names:
        (tmp_path / "starts" / name).mkdir(parents=True)
    assert [start.number for start in RunFiles(tmp_path).starts] == [2, 10, 100, 9999, 10000]


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), (-0.5, -0.5), (0, 0.0), (True, None), (None, None), ("3", None), (float("nan"), None), (10**400, None),
     (float("-inf"), None), ([1], None)],
)
def test_what_is_a_number(value, number):
    assert to_number(value) == number


def test_keys_of_another_version_are_left_out(tmp_path):
    run = _write_run(tmp_path / "run")
    folder = _start(run, End("failed", "x"), [Failure(1, "ValueError", "no", host="n")], job=4711)
    for file, extra in (("end.json", {"signal": 9}), ("failed-00001.json", {"stack": "..."})):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | extra))
    (folder / "failed-00002.json").write_text('{"rank": 2, "error": "E", "message": null, "time": "soon"}')
    (folder / "failed-00003.json").write_text('{"rank": 3}')
    line = _line(run)
    assert (line.state, line.job, line.error) == ("failed", "4711", "rank 2 on ?: E: None")
    assert line.broken == ("starts/0001/failed-00003.json",)
    (folder / "end.json").write_text('{"reason": ["?"], "message": 3}')
    assert _line(run).state == "?"


def test_the_last_whole_lines_of_metrics_count(tmp_path):
    run = _write_run(tmp_path / "run", num_steps=1000, steps=30)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('not json\n\n{"step": 31, "loss": null, "samples_per_s": "fast", "step_s": true}\n{"step": 32, "lo')
    line = _line(run)
    # The last 20 lines are those of steps 14 to 30, two that are none, and step 31, which knows no speed.
    assert (line.step, line.loss, line.samples_per_s) == (31, None, 31.0)
    assert [record["step"] for record in RunFiles(run).read_metrics(20)] == [*range(14, 32)]
    for content in ("", '{"step": 1, "loss": 2.5'):
        (run / "metrics.jsonl").write_text(content)
        assert (_line(run).step, _line(run).loss, _line(run).broken) == (None, None, ())
    saved = run / "checkpoints" / "step-00000012"
    saved.mkdir(parents=True)
    assert _line(run).step is None
    (saved / "COMPLETE").write_text("")
    assert _line(run).step == 12
    (run / "metrics.jsonl").write_text('{"step": NaN, "loss": Infinity}\n{"step": 1e400}\n')
    assert (_line(run).step, _line(run).loss) == (12, None)


class _Counted(io.FileIO):
    """A file that keeps how much is read of it at a time."""

    sizes: list[int] = []

    def read(self, size=-1):
        self.sizes.append(size)
        return super().read(size)


def test_only_the_end_of_a_long_file_is_read(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"

    def last(num, content):
        _Counted.sizes = []
        file.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, mode: _Counted(path, mode))
            return read_last_lines(file, num)

    records = [b'{"step": %d}' % step for step in range(50_000)]
    assert last(20, b"\n".join(records) + b"\nhalf") == records[-20:]
    assert _Counted.sizes == [1 << 14]
    long = b"x" * (1 << 15)
    assert last(3, b"a\n" + long + b"\nb\nc\n") == [long, b"b", b"c"]
    assert _Counted.sizes == [1 << 14, len(long) + 7]
    assert last(3, b"x" * (1 << 21) + b"\nb\nc\n") == [b"b", b"c"]  # never more than a MiB of it
    assert _Counted.sizes == [1 << 14, 1 << 16, 1 << 18, 1 << 20]


def _plain(**known):
    empty = RunLine("run", "running", None, None, None, None, None, None, False, 0, None, None, None, ())
    return replace(empty, **known)


def test_the_table():
    lines = [
        _plain(
            name="stage1", state="finished", step=2180, num_steps=2180, loss=1.20312, samples_per_s=512.34, job="41"
        ),
        _plain(
            name="pipeline/视觉", step=50, num_steps=5197, loss=0.9, samples_per_s=4.126, left_s=187_320.0, quiet_s=725,
            silent=True, restarts=2, job="4711", slurm="RUNNING",
            error="start 2, rank 3 on node2: ValueError: the loss of step 12 is nan",
        ),
        _plain(name="new", state="not started"),
    ]
    assert format_table(lines, width=150) == [
        "RUN            STATE             STEP    LOSS  SAMPLES/S   LEFT  LAST LINE        RESTARTS  JOB   SLURM    "
        "LAST ERROR",
        "stage1         finished     2180/2180  1.2031      512.3      -  -                       -  41    -        "
        "-",
        "pipeline/视觉  running        50/5197  0.9000       4.13  2d04h  12m05s (silent)         2  4711  RUNNING  "
        "start 2, rank 3 on node2: ValueError: th...",
        "new            not started          -       -          -      -  -                       -  -     -        "
        "-",
    ]
    assert text_width(format_table(lines, width=150)[2]) == 150
    assert format_table(lines)[2].endswith("the loss of step 12 is nan")
    assert all(row.endswith(("LAST ERROR", "-", "start 2, rank 3 on no...")) for row in format_table(lines, 80))


def test_columns_that_say_nothing_are_left_out():
    assert format_table([_plain(step=3, num_steps=None), _plain(name="b", state="lost")]) == [
        "RUN  STATE    STEP", "run  running   3/-", "b    lost        -",
    ]
    assert format_table([]) == ["RUN  STATE  STEP"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (86399, "23h59m"), (86400, "1d00h"),
     (900_000, "10d10h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_texts_are_shortened_by_what_they_take():
    assert (shorten("abcdefgh", 8), shorten("abcdefghi", 8)) == ("abcdefgh", "abcde...")
    assert shorten("ab cdefghi", 6) == "ab..."
    assert (text_width("视觉"), text_width("e\u0301"), shorten("视觉视觉视觉", 8)) == (4, 1, "视觉...")
    assert shorten("abcdef", 2) == ".."
    assert len(shorten("x" * 20_000, 50)) == 50


@pytest.fixture
def utc(monkeypatch):
    """Clocks of this process show UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_the_history_of_a_run(tmp_path, utc):
    run = tmp_path / "run"
    assert list(explain_starts(_write_run(run))) == [f"{run}: 0 start(s)"]
    at = 1_795_611_600.0  # 2026-11-25 13:00:00
    peers = [
        Failure(rank, "PeerFailedError", "another rank is gone", 120, True, f"node{rank // 2}", at + 61)
        for rank in range(16) if rank != 3
    ]
    peers[5] = replace(peers[5], time=at + 59)
    root = Failure(3, "RuntimeError", "out of memory\n  Lower train.micro_batch_size.", 121, False, "node1", at + 60)
    message = f"rank 3 on node1: RuntimeError: {root.message}"
    _start(run, End("failed", message, 100, "requeue", "it failed; step 100 is saved", at + 62), [*peers, root],
           job="11", nodes="node[0-7]", time=at)
    lost = End("lost", "it ended without a word\nat all", -1, time=at + 99)
    _start(run, lost, job="11", restart=1, nodes="", host="h", time=at + 70)
    _start(run, host="h", time=at + 100)
    assert list(explain_starts(run)) == [
        f"{run}: 3 start(s)",
        "start 1: job 11 (restart 0) on node[0-7], 16 ranks, 2026-11-25 13:00:00",
        "  failed 2026-11-25 13:01:02, step 100 is saved",
        "  decided: requeue (it failed; step 100 is saved)",
        "  cause: rank 3 on node1, 121 steps done, 2026-11-25 13:01:00: RuntimeError: out of memory",
        "      Lower train.micro_batch_size.",
        "  also: ranks 0-2,4-15 on node0, node1, node2, node3 and 4 more, 120 steps done, 2026-11-25 13:00:59: "
        "PeerFailedError: another rank is gone",
        "start 2: job 11 (restart 1) on h, 16 ranks, 2026-11-25 13:01:10",
        "  lost 2026-11-25 13:01:39, no step is saved",
        "    it ended without a word",
        "    at all",
        "start 3: no job on h, 16 ranks, 2026-11-25 13:01:40",
        "  no end is known: it runs, or was lost",
    ]
    kinds = [Failure(rank, "E", f"rank {rank}", host="h", time=at + rank) for rank in range(20)]
    many = _start(run, End("failed"), kinds)
    last = list(explain_starts(run))[-11:]
    assert last[0].startswith("start 4: ")
    assert [line.split(", ")[0] for line in last[2:4]] == ["  cause: rank 0 on h", "  also: rank 1 on h"]
    assert last[-1] == f"  and 12 more kinds of failure, in {many}"
    assert (find_start(run), find_start(run, 2)) == (many, run / "starts" / "0002")
    with pytest.raises(ConfigError, match=r"has no start 9; it has 1-4"):
        find_start(run, 9)
    with pytest.raises(ConfigError, match="no start of a run there"):
        find_start(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        list(explain_starts(tmp_path / "nowhere"))


def _jobs(*arguments):
    main = runpy.run_path(str(ROOT / "tools" / "jobs"))["main"]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = _jobs()
    assert (nothing.exit_code, nothing.output) == (0, "runs: no runs there; there is no such folder\n")
    assert _jobs("--json").output == "[]\n"
    run = _write_run(tmp_path / "runs" / "one", steps=100)
    folder = _start(run, End("finished", step=100))
    (folder / "rank-00000.log").write_text("2026-11-25T13:00:00.000000 hello\n2026-11-25T13:00:01.000000 end\n")
    (folder / "rank-00001.log").write_text("2026-11-25T13:00:00.500000 hello\n")
    table = "RUN  STATE        STEP    LOSS  SAMPLES/S\none  finished  100/100  0.0800       31.0\n"
    for arguments in ((), ("runs",), ("list",), ("list", "runs")):
        assert _jobs(*arguments).output == table
    (record,) = json.loads(_jobs("runs", "--json").output)
    assert (record["name"], record["state"], record["step"], record["left_s"]) == ("one", "finished", 100, None)
    whole = ["2026-11-25 13:00:00.000 [0-1] hello", "2026-11-25 13:00:01.000 [0] end"]
    assert _jobs("logs", run).output.splitlines() == whole
    assert _jobs("logs", run, "--last", "1", "--follow").output.splitlines() == whole[1:]
    assert _jobs("logs", run, "--rank", 1, "--each").output == "2026-11-25 13:00:00.500 [1] hello\n"
    refused = _jobs("logs", run, "--start", 2)
    assert (refused.exit_code, refused.output) == (1, f"Error: ConfigError: {run} has no start 2; it has 1\n")
    assert _jobs("why", run).output.splitlines()[0] == f"{run}: 1 start(s)"
    assert "Commands:" in _jobs("--help").output


def test_the_command_starts_fast():
    listing = "import sys, runpy; sys.argv = ['jobs', '-h']\ntry: runpy.run_path('tools/jobs', run_name='__main__')\n"
    code = f"{listing}finally: print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
