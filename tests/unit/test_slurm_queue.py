"""What squeue prints becomes states; what it does not say stays unknown."""

import os
import time

import pytest

from llava_ds.cluster.slurm_queue import NOT_QUEUED, job_states, place_in_queue


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Puts a script in the place of squeue; its arguments and SQUEUE_ variables stand in ``asked``."""

    def write(body: str):
        script = tmp_path / "squeue"
        script.write_text(f'#!/bin/bash\n{{ printf "%s\\n" "$@"; env | grep ^SQUEUE_; }} >"{tmp_path}/asked"\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "asked"

    return write


def test_states_of_jobs_and_the_reason_of_one_that_waits(squeue, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    rows = ["11 11 RUNNING None", "12 12 PENDING ReqNodeNotAvail, UnavailableNodes:node[1-2]", "13 13 PENDING None",
            "14 14 PENDING (BeginTime)", "15 15 OUT_OF_MEMORY OutOfMemory", "99 99 RUNNING None"]
    asked = squeue("printf '%s\\n' " + " ".join(f"'{row}'" for row in rows))
    assert job_states(["14", "11", "12", "12", "13", "15", "16"]) == {
        "11": "RUNNING",
        "12": "PENDING (ReqNodeNotAvail, UnavailableNodes:node[1-2])",
        "13": "PENDING",
        "14": "PENDING (BeginTime)",
        "15": "OUT_OF_MEMORY",
        "16": NOT_QUEUED,
    }
    assert asked.read_text().splitlines() == [
        "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--jobs=11,12,13,14,15,16",
        "--format=%A %i %T %r",
    ]


def test_elements_of_an_array_are_known_by_either_number(squeue):
    # The elements that wait share the number of the array, which the last of them keeps when it runs.
    squeue("printf '%s\\n' '20 20_4 PENDING Priority' '21 20_1 RUNNING None' '20 20_5 PENDING Priority' "
           "'22 20_2 COMPLETING None' '30 30_2 PENDING Priority' '30 30_1 RUNNING None' '30 30_3 PENDING Priority'")
    assert job_states(["21", "20_2", "20_5", "20", "20_9", "30"]) == {
        "21": "RUNNING",
        "20_2": "COMPLETING",
        "20_5": "PENDING (Priority)",
        "20": "PENDING (Priority)",
        "20_9": NOT_QUEUED,
        "30": "RUNNING",
    }


def test_one_job_that_is_gone_is_not_an_unknown_one(squeue):
    squeue("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_states(["11"]) == {"11": NOT_QUEUED}


def test_lines_that_make_no_sense_are_left_out(squeue):
    squeue(r"printf 'CLUSTER: one\n\n11 11\n\xff\xfe 3 RUNNING None\n12 12 RUNNING\n'")
    assert job_states(["11", "12"]) == {"11": NOT_QUEUED, "12": "RUNNING"}


@pytest.mark.parametrize(
    "body",
    [
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
        "echo '11 11 RUNNING None'; exit 2",
        "kill -9 $$",
    ],
)
def test_states_are_unknown_when_slurm_does_not_answer(squeue, body):
    squeue(body)
    assert job_states(["11", "12"]) == {}


def test_a_silent_slurm_is_not_waited_for(squeue):
    squeue("exec sleep 30")
    began = time.monotonic()
    assert job_states(["11"], timeout_s=0.3) == {}
    assert time.monotonic() - began < 5


def test_states_are_unknown_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states(["11"]) == {}
    (tmp_path / "squeue").write_text("not a program")
    assert job_states(["11"]) == {}


def test_squeue_is_asked_of_nothing_but_numbers_of_jobs(squeue):
    asked = squeue("echo '11 11 RUNNING None'; echo '12 12+0 RUNNING None'")
    assert job_states([]) == {}
    assert job_states(["", "local", "-1", "11; true", "1,2", "11\n"]) == {}
    assert not asked.exists()
    assert job_states(["", "11", "12+0", "x"]) == {"11": "RUNNING", "12+0": "RUNNING"}
    assert "--jobs=11,12+0" in asked.read_text().splitlines()


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ("RUNNING", "runs"), ("COMPLETING", "runs"), ("SUSPENDED", "runs"), ("CONFIGURING", "runs"),
        ("PENDING", "waits"), ("PENDING (BeginTime)", "waits"), ("REQUEUE_HOLD", "waits"), ("SPECIAL_EXIT", "waits"),
        (NOT_QUEUED, "gone"), ("COMPLETED", "gone"), ("CANCELLED", "gone"), ("NODE_FAIL", "gone"),
        ("TIMEOUT", "gone"),
    ],
)
def test_what_a_state_means(state, place):
    assert place_in_queue(state) == place
