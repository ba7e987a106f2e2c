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


def test_a_rank_that_does_not_see_the_run_says_so_and_starts_nothing(tmp_path):
    done = _rank(tmp_path / "elsewhere", 2, f"touch {tmp_path}/ran")
    assert done.returncode == 1 and re.match("rank 2 on .*rank-00002.log cannot be written; LLAVA_RUNS", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_submitted_anew_with_what_it_had_asked_for():
    shown = {
        "JobName": "llava-stage1", "Account": "(null)", "Partition": "gpu", "QOS": "N/A", "TimeLimit": "02:00:00",
        "TresPerNode": "gres:gpu:8", "OverSubscribe": "NO", "Features": "(null)", "MinMemoryNode": "0",
        "StdOut": "/x/%j", "Requeue": "0",
    }
    environ = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8",
               "LLAVA_SBATCH": "--nodelist=node[1-4] --signal=B:USR1@600"}
    assert options_of(shown, environ) == [
        "--nodes=4", "--ntasks-per-node=8", "--exclusive", "--no-requeue", "--signal=B:USR1@600",
        "--job-name=llava-stage1", "--partition=gpu", "--time=02:00:00", "--gres=gpu:8", "--output=/x/%j",
    ]


def test_the_new_job_does_not_get_the_old_ones_variables():
    old = {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/slurm.conf", "LLAVA_DS_START": "/runs/starts/0001", "HOME": "/h"}
    assert clean_environ(old, "7") == {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/h", "LLAVA_DS_SUCCEEDS": "7"}


def _environ(folder: Path, settings: str, **given: str) -> dict[str, str]:
    """Of a user with a settings file."""
    (folder / "settings.sh").write_text(settings)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "LLAVA_"))}
    facts = {"LLAVA_HOME": SLURM.parent, "LLAVA_SETTINGS": folder / "settings.sh", "LLAVA_RUNS": folder / "runs"}
    return own | {key: str(value) for key, value in facts.items()} | given


@pytest.mark.parametrize(("given", "expected"), [({}, "4"), ({"LLAVA_NODES": "9"}, "9")])
def test_the_environment_wins_over_the_settings(tmp_path, given, expected):
    environ = _environ(tmp_path, "LLAVA_NODES=4\nLLAVA_TIME='1-00:00:00'\n", **given)
    script = 'source "$LLAVA_HOME/slurm/common.sh"; llava_load_settings; echo "$LLAVA_NODES $LLAVA_TIME"'
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=30)
    assert done.stdout == f"{expected} 1-00:00:00\n", done.stderr
    assert (tmp_path / "runs").is_dir()


def test_a_setting_of_several_lines_comes_back_from_the_environment_as_it_was(tmp_path):
    """A job reads the settings again, which its environment holds already."""
    environ = _environ(tmp_path, "LLAVA_SETUP='echo one\necho \"two $((1 + 1))\"'\n")
    script = 'source "$LLAVA_HOME/slurm/common.sh"; llava_load_settings; llava_load_settings; eval "$LLAVA_SETUP"'
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("one\ntwo 2\n", "")


SBATCH = """#!/bin/bash
echo "$*" >>"$ASKED"
wc -l <"$ASKED"
"""


@pytest.mark.parametrize("gpus", ["8", "a100:8"])
def test_the_chain_asks_for_as_many_tasks_as_gpus_where_a_model_runs(tmp_path, gpus):
    """Of an sbatch that only notes what it is asked for; GPUs may be of a type."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    environ = _environ(tmp_path, f"LLAVA_NODES=2\nLLAVA_GPUS_PER_NODE={gpus}\n", ASKED=str(tmp_path / "asked"))
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    done = subprocess.run([SLURM / "pipeline.sh"], env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    sizes = [re.findall(r"--(nodes|ntasks-per-node|gpus-per-node)=(\S+)", line)
             for line in (tmp_path / "asked").read_text().splitlines()]
    large = [("nodes", "2"), ("ntasks-per-node", "8"), ("gpus-per-node", gpus)]
    small = [("nodes", "1"), ("ntasks-per-node", "1")]
    assert sizes == [small, large, large, small, large]


SRUN = """#!/bin/bash
echo "$*" >>"$ASKED"
while [ "$1" != --json ]; do shift; done
touch "$2"
"""
SCONTROL = "#!/bin/bash\nhostname\n"


def test_a_task_has_its_own_scores_and_another_checkpoint_may_be_named(tmp_path):
    """Of an srun that notes what it is asked for, and writes the scores."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    runs = tmp_path / "runs"
    for file in (runs / "merged" / "COMPLETE", tmp_path / "venv" / "bin" / "activate"):
        file.parent.mkdir(parents=True)
        file.touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "LLAVA_SUBMITTED": "1"}
    environ = _environ(tmp_path, "", **job, ASKED=str(tmp_path / "asked"), LLAVA_VENV=str(tmp_path / "venv"))
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"

    def evaluate(*options: str, **given: str) -> str:
        (tmp_path / "asked").write_text("")
        command = [str(SLURM / "evaluate.sh"), *options]
        done = subprocess.run(command, env=environ | given, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "asked").read_text().partition("tools/evaluate ")[2].strip() or done.stdout

    assert evaluate() == f"{runs}/merged --predictions {runs}/predictions.jsonl --json {runs}/scores.json"
    assert evaluate() == f"{runs}/scores.json is there already; remove it to do this again\n"
    own = f"--predictions {runs}/predictions-scienceqa.jsonl --json {runs}/scores-scienceqa.json"
    assert evaluate("--task=scienceqa") == f"{runs}/merged {own} --task=scienceqa"
    own = own.replace("-scienceqa", "-other-scienceqa")
    options = ["--task", "scienceqa", "--data", "d"]
    assert evaluate(*options, LLAVA_EVALUATE="x/other") == f"x/other {own} --task scienceqa --data d"
    own = f"--predictions {runs}/predictions-b.jsonl --json {runs}/scores-b.json"
    assert evaluate(LLAVA_EVALUATE="x/b") == f"x/b {own}"
