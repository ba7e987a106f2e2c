"""A run folder has one writer; a later start of its job takes it from an earlier one."""

import fcntl
import json

import pytest

from llava_ds.engine.run_lock import LOCK_FILE, check_not_held, hold_run, read_holder
from llava_ds.errors import CheckpointError, ConfigError


def _job(job: str, restart: int, **more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart), **more}


@pytest.mark.parametrize(
    "later", [{}, _job("8", 3), _job("7", 1), _job("7", 0), _job("8", 0, LLAVA_DS_SUCCEEDS="6")]
)
def test_another_run_is_kept_out(tmp_path, later):
    first = hold_run(tmp_path, _job("7", 1))
    for attempt in (lambda: hold_run(tmp_path, later, patience_s=0), lambda: check_not_held(tmp_path, later)):
        with pytest.raises(ConfigError, match="now, by process [0-9]+ on .*, job 7 restart 1"):
            attempt()
    first.check()


@pytest.mark.parametrize("later", [_job("7", 2), _job("8", 0, LLAVA_DS_SUCCEEDS="7")])
def test_a_later_start_of_the_job_takes_over_and_the_earlier_one_writes_nothing_more(tmp_path, later, capsys):
    first = hold_run(tmp_path, _job("7", 1))
    check_not_held(tmp_path, later)
    second = hold_run(tmp_path, later, patience_s=0)
    assert "taken over" in capsys.readouterr().out
    second.check()
    taken = f"another start of this run has taken over: .*job {later['SLURM_JOB_ID']}"
    with pytest.raises(CheckpointError, match=taken):
        first.check()
    assert read_holder(tmp_path / LOCK_FILE)["job"] == later["SLURM_JOB_ID"]
    with pytest.raises(ConfigError):
        hold_run(tmp_path, _job("9", 0))


def test_a_lock_that_was_let_go_is_taken_without_a_word(tmp_path, capsys):
    hold_run(tmp_path, {}).release()
    hold_run(tmp_path, {}).check()
    assert capsys.readouterr().out == ""
    assert sorted(json.loads((tmp_path / LOCK_FILE).read_text())) == ["host", "pid", "token"]


def test_a_folder_that_was_moved_keeps_its_lock(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lock = hold_run(run, {})
    run.rename(tmp_path / "run.1")
    lock.check()


def test_where_locks_do_nothing_the_earlier_run_finds_the_later_one_when_it_saves(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = hold_run(tmp_path, {}), hold_run(tmp_path, {})
    assert capsys.readouterr().out.count("no locks here") == 2
    second.check()
    with pytest.raises(CheckpointError, match="has taken over"):
        first.check()
