"""When a job is started again and when not."""

import pytest

from llava_ds.checkpoint.layout import commit, step_dir
from llava_ds.cluster.batch import begin, end, note_preflight, own_start, refuse
from llava_ds.cluster.decide import Past, decide, of_one_job, signature
from llava_ds.constants import FINISHED_MARKER
from llava_ds.errors import ConfigError
from llava_ds.starts import End, Failure, list_starts, note_failure, read_failures, write_end

KILLED, OTHER = signature("Killed", "killed by signal 9"), signature("RuntimeError", "out of memory")


def _failed(began_at: int, what: str = KILLED, reason: str = "failed") -> Past:
    return Past(reason, what, began_at)


@pytest.mark.parametrize(
    ("past", "step", "decision"),
    [
        ([Past("finished", "", 10)], 20, "done"),
        ([Past("stopped", "", 10)], 13, "requeue"),
        ([_failed(-1)], -1, "requeue"),
        ([_failed(-1), _failed(-1)], -1, "stop"),
        ([_failed(-1), _failed(-1)], 0, "stop"),  # the save before step 1 is no progress
        ([_failed(-1), _failed(0)], 0, "stop"),
        ([_failed(-1), _failed(0)], 3, "requeue"),
        ([_failed(10), _failed(10, OTHER)], 10, "requeue"),
        ([_failed(10), _failed(10, OTHER), _failed(10)], 10, "requeue"),
        ([_failed(10), _failed(10, OTHER), _failed(10, OTHER)], 10, "stop"),
        ([_failed(0), _failed(10), _failed(20)], 30, "requeue"),  # the same each time, but it goes on
        ([_failed(0), _failed(10), _failed(20), _failed(20)], 20, "stop"),
        ([_failed(10), Past("stopped", "", 10), _failed(10)], 10, "requeue"),
        ([_failed(10, reason="hung"), _failed(10, reason="hung")], 10, "stop"),
        ([Past("lost", "", 10)] * 4, 10, "requeue"),
        ([Past("lost", "", 10)] * 5, 10, "stop"),
        ([Past("stopped", "", 0)] * 5, 0, "stop"),
        ([Past("lost", "", 0)] + [Past("lost", "", 10)] * 4, 10, "requeue"),
        ([Past("failed", "", 5, settings=True)], 50, "stop"),
        ([Past("failed", "", 5, bad_nodes=True)], 5, "stop"),
    ],
)
def test_a_job_goes_on_while_it_gets_somewhere(past, step, decision):
    assert decide(past, step)[0] == decision


def test_bad_nodes_are_left_out_where_that_is_wanted_but_not_for_ever():
    bad = Past("failed", "x", 5, bad_nodes=True)
    assert [decide([bad] * count, 5, exclude=True)[0] for count in (1, 2, 4, 5)] == [
        "resubmit", "resubmit", "resubmit", "stop",
    ]


def test_failures_of_one_kind_differ_in_numbers_only():
    assert signature("E", "rank 3 at 0x1f, step 41\nmore 7") == signature("E", "rank 12 at 0x2f, step 40\nelse")
    assert signature("E", "rank 3 at a") != signature("E", "rank 3 at b")
    assert signature("E", "") == "E: "


def _environ(job: str, restart: int = 0, **more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_NODELIST": "node[1-2]", **more}


def _save(run, step: int) -> None:
    folder = step_dir(run, step)
    folder.mkdir(parents=True)
    commit(folder)


def test_starts_of_a_job_are_told_from_those_of_others(tmp_path):
    folders = [begin(tmp_path, _environ("7")), begin(tmp_path, _environ("8"))]
    folders.append(begin(tmp_path, _environ("9", LLAVA_DS_SUCCEEDS="7")))
    folders.append(begin(tmp_path, _environ("9", 1, LLAVA_DS_SUCCEEDS="7", LLAVA_RANKS="16")))
    starts = list_starts(tmp_path)
    assert [start.folder for start in starts] == folders and [start.number for start in starts] == [1, 2, 3, 4]
    assert [start.number for start in of_one_job(starts, starts[-1].facts)] == [1, 3, 4]
    assert [start.facts.get("num_ranks") for start in starts] == [None, None, None, 16]
    # That of job 8 may still be running.
    assert [start.end and start.end.reason for start in starts] == ["lost", None, "lost", None]


def test_a_run_that_is_killed_twice_at_the_same_place_stops_and_says_why(tmp_path):
    _save(tmp_path, 10)
    found = []
    for restart in range(2):
        folder = begin(tmp_path, _environ("7", restart))
        note_failure(folder, Failure(1, "RuntimeError", "Connection closed by peer", of_peer=True, time=1.0))
        note_failure(folder, Failure(3, "Killed", f"killed by signal 9 at {restart}", host="node2", time=2.0))
        found.append(end(tmp_path, list_starts(tmp_path)[-1], 137, {}))
    assert [one.decision for one in found] == ["requeue", "stop"]
    assert found[1].message == "rank 3 on node2: Killed: killed by signal 9 at 1"
    why = "it failed the same way 2 times in a row without a new checkpoint; step 10 is the last that is saved"
    assert found[1].why == why
    assert found[1].step == 10 and list_starts(tmp_path)[1].end == found[1]


def test_a_run_is_finished_by_its_marker_whatever_srun_returned(tmp_path):
    folder = begin(tmp_path, _environ("7"))
    (tmp_path / FINISHED_MARKER).write_text("")
    note_failure(folder, Failure(0, "RuntimeError", "too late"))
    assert end(tmp_path, list_starts(tmp_path)[-1], 143, {}).decision == "done"


def test_srun_that_ends_without_a_word_of_a_rank_is_a_failure(tmp_path):
    begin(tmp_path, _environ("7"))
    found = end(tmp_path, list_starts(tmp_path)[-1], 1, {})
    assert (found.reason, found.decision) == ("failed", "requeue") and "srun's exit code was 1" in found.message


def test_five_starts_that_were_lost_are_the_last(tmp_path):
    for restart in range(5):
        begin(tmp_path, _environ("7", restart))
    with pytest.raises(ConfigError, match="5 starts in a row .* came to nothing: no step is done and saved yet"):
        begin(tmp_path, _environ("7", 5))
    assert list_starts(tmp_path)[-1].end.decision == "stop"
    begin(tmp_path, _environ("8"))  # another job is another try


@pytest.mark.parametrize(
    ("report", "error", "decision"),
    [
        ('{"bad_nodes": ["node2"], "problems": [{"node": "node2", "message": "no file"}]}', "BadNodes", "resubmit"),
        ('{"bad_nodes": [], "problems": [{"node": null, "message": "no file"}], "code": 1}', "SettingsProblem", "stop"),
        ('{"bad_nodes": [], "problems": [{"node": null, "message": "slow"}], "code": 3}', "SuspectNodes", "requeue"),
        ("", "Preflight", "requeue"),
    ],
)
def test_what_the_preflight_found_decides(tmp_path, report, error, decision):
    folder = begin(tmp_path, _environ("7"))
    (folder / "preflight.json").write_text(report)
    start = list_starts(tmp_path)[-1]
    note_preflight(start, 3)
    assert [failure.error for failure in read_failures(folder)] == [error]
    assert end(tmp_path, start, 3, {"LLAVA_EXCLUDE_BAD_NODES": "1"}).decision == decision


def test_a_start_that_was_refused_is_on_record(tmp_path):
    refuse(tmp_path, "stage 1 is not finished", _environ("7"))
    (start,) = list_starts(tmp_path)
    assert (start.end.reason, start.end.message, start.end.decision) == ("failed", "stage 1 is not finished", "stop")


def test_a_batch_script_ends_its_own_start_whatever_began_since(tmp_path):
    mine, other = begin(tmp_path, _environ("7")), begin(tmp_path, _environ("8"))
    write_end(mine, End("stopped", "by a signal", 4))
    note_failure(other, Failure(0, "ConfigError", "a run is being written to it now"))
    start = own_start(tmp_path, {"LLAVA_DS_START": str(mine)})
    assert start.folder == mine and end(tmp_path, start, 85, {}).decision == "requeue"
    assert own_start(tmp_path, {}).folder == other
    assert list_starts(tmp_path)[1].end is None


def test_a_start_that_was_cut_off_does_not_end_as_the_one_that_finished_elsewhere(tmp_path):
    """Its batch script lives on behind the cut, and goes on when the run is finished."""
    note_failure(begin(tmp_path, _environ("7")), Failure(0, "Hang", "rank 1 is gone", step=25))
    begin(tmp_path, _environ("7", 1))
    _save(tmp_path, 90)
    (tmp_path / FINISHED_MARKER).write_text("")
    first, second = list_starts(tmp_path)
    ended = end(tmp_path, first, 137, {}, left_to_slurm=True)
    assert (ended.reason, ended.decision, ended.message, ended.step) == ("hung", None, "rank 1 is gone", 25)
    write_end(second.folder, End("finished"))
    ended = end(tmp_path, list_starts(tmp_path)[1], 0, {}, left_to_slurm=True)  # cancelled after its last step
    assert (ended.reason, ended.decision) == ("finished", "done")


def test_a_job_that_has_to_stop_is_not_started_by_a_requeue_of_others(tmp_path):
    for restart in range(2):
        note_failure(begin(tmp_path, _environ("7", restart)), Failure(0, "Killed", "killed by signal 9"))
    with pytest.raises(ConfigError, match="failed the same way 2 times"):
        begin(tmp_path, _environ("7", 2))


def test_a_start_that_was_taken_for_lost_tells_what_its_ranks_said_since(tmp_path):
    """Of two jobs on one folder, the one that holds its lock records that the other is over before that has ended."""
    folder = begin(tmp_path, _environ("7"))
    write_end(folder, End("lost", "it ended without a word"))
    note_failure(folder, Failure(0, "ConfigError", "a run is being written", host="node1"))
    found = end(tmp_path, list_starts(tmp_path)[-1], 1, {})
    assert (found.reason, found.decision) == ("failed", "stop")
    assert found.message == "rank 0 on node1: ConfigError: a run is being written"


def test_what_was_recorded_stays(tmp_path):
    folder = begin(tmp_path, _environ("7"))
    write_end(folder, End("stopped", "by a signal", 4))
    found = end(tmp_path, list_starts(tmp_path)[-1], 85, {})
    assert (found.reason, found.message, found.decision) == ("stopped", "by a signal", "requeue")
