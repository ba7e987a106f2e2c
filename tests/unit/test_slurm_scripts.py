"""The shell parts of a Slurm run that need no Slurm: what a rank leaves, and what is asked of sbatch."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from llava_ds.cluster.slurm_jobs import clean_environ, options_of
from llava_ds.starts import read_failures

SLURM = Path(__file__).parents[2] / "slurm"
STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6} (.*)")


def _rank(folder: Path, rank: int, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"SLURM_PROCID": str(rank), "LLAVA_DS_START": str(folder)} | more
    command = ["bash", str(SLURM / "rank.sh"), "bash", "-c", script]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)


def _lines(file: Path) -> list[str]:
    return [STAMPED.fullmatch(line)[1] for line in file.read_text().splitlines()]


def test_a_rank_leaves_stamped_lines_and_its_exit_code(tmp_path):
    script = "echo one; echo two >&2; printf 'no end'; exit 7"
    done = _rank(tmp_path, 3, script)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    assert _lines(tmp_path / "rank-00003.log") == ["one", "two", "no end"]
    done = _rank(tmp_path, 0, script, LLAVA_STEP="preflight")
    assert done.returncode == 7 and done.stdout == (tmp_path / "preflight-rank-00000.log").read_text()
    assert _lines(tmp_path / "preflight-rank-00000.log") == ["one", "two", "no end"]
    assert read_failures(tmp_path) == []


def test_a_rank_that_is_killed_leaves_a_word_and_is_not_held_up_by_what_it_left_running(tmp_path):
    begin = time.monotonic()
    done = _rank(tmp_path, 12, "sleep 20 & echo alive; kill -KILL $$")
    assert done.returncode == 137 and time.monotonic() - begin < 15
    (failure,) = read_failures(tmp_path)
    assert (failure.rank, failure.error, failure.of_peer) == (12, "Killed", False)
    assert failure.message.startswith("killed by signal 9; ") and abs(failure.time - time.time()) < 60
    assert _lines(tmp_path / "rank-00012.log") == ["alive"]


def test_what_a_rank_said_itself_stays(tmp_path):
    (tmp_path / "failed-00001.json").write_text(json.dumps({"rank": 1, "error": "DataError", "message": "m"}))
    assert _rank(tmp_path, 1, "kill -TERM $$; sleep 5").returncode == 0  # it is ignored until the command listens
    assert _rank(tmp_path, 1, "kill -KILL $$").returncode == 137
    assert [failure.error for failure in read_failures(tmp_path)] == ["DataError"]


def test_a_job_is_submitted_anew_with_what_it_had_asked_for():
    shown = {
        "JobName": "llava-stage1", "Account": "(null)", "Partition": "gpu", "QOS": "N/A", "TimeLimit": "02:00:00",
        "TresPerNode": "gres:gpu:8", "OverSubscribe": "NO", "Features": "(null)", "MinMemoryNode": "0",
        "StdOut": "/x/%j",
    }
    environ = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8"}
    assert options_of(shown, environ) == [
        "--nodes=4", "--ntasks-per-node=8", "--exclusive", "--job-name=llava-stage1", "--partition=gpu",
        "--time=02:00:00", "--gres=gpu:8", "--output=/x/%j",
    ]


def test_the_new_job_does_not_get_the_old_ones_variables():
    old = {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/slurm.conf", "LLAVA_DS_START": "/runs/starts/0001", "HOME": "/h"}
    assert clean_environ(old, "7") == {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/h", "LLAVA_DS_SUCCEEDS": "7"}


@pytest.mark.parametrize(("given", "expected"), [({}, "4"), ({"LLAVA_NODES": "9"}, "9")])
def test_the_environment_wins_over_the_settings(tmp_path, given, expected):
    settings = tmp_path / "settings.sh"
    settings.write_text("LLAVA_NODES=4\nLLAVA_TIME='1-00:00:00'\n")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "LLAVA_"))} | {
        "LLAVA_HOME": str(SLURM.parent), "LLAVA_SETTINGS": str(settings), "LLAVA_RUNS": str(tmp_path / "runs"), **given,
    }
    script = 'source "$LLAVA_HOME/slurm/common.sh"; llava_load_settings; echo "$LLAVA_NODES $LLAVA_TIME"'
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=30)
    assert done.stdout == f"{expected} 1-00:00:00\n", done.stderr
    assert (tmp_path / "runs").is_dir()
