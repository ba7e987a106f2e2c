"""Ranks wait for the work of rank 0 for as long as it takes, and hear of its failure."""

import json
from pathlib import Path

from tests.helpers.launch import assert_all_fine, fork_ranks

JOB = """
import os, time
from datetime import timedelta
import torch.distributed as dist
from llava_ds.distributed import apply_launcher_environment, flush_and_exit, run_on_main_first
from llava_ds.errors import ConfigError

ranks = apply_launcher_environment(os.environ)
dist.init_process_group("gloo", timeout=timedelta(seconds=2))

def work():
    if ranks.is_main:
        time.sleep(5)  # longer than a collective may take
    return f"done by {ranks.rank}"

def fail():
    raise ConfigError("no such thing")

said = [run_on_main_first(ranks, work)]
try:
    run_on_main_first(ranks, fail)
except ConfigError as error:
    said.append(str(error))
os.write(1, f"{ranks.rank}: {said}\\n".encode())
flush_and_exit(0)
"""


def test_ranks_wait_for_rank_0_and_hear_of_its_failure(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    ranks = fork_ranks(2, [str(script)])
    assert_all_fine(ranks)
    assert [rank.stdout for rank in ranks] == [
        "0: ['done by 0', 'no such thing']\n",
        "1: ['done by 1', 'rank 0 failed, so rank 1 stops: ConfigError: no such thing']\n",
    ]


def test_ranks_that_differ_are_named_on_every_rank(tmp_path):
    assert_all_fine(fork_ranks(2, [str(Path(__file__).with_name("agree_job.py")), str(tmp_path)]))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["gathered"] == second["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["same"] == second["same"] == "fine: None"
    assert first["different"] == second["different"]
    assert "the plans differ between ranks: rank 0 has abc0, rank 1 has abc1" in first["different"]
    assert first["main fails"] == "DataError: no data on rank 0"
    assert second["main fails"] == "PeerFailedError: rank 0 failed, so rank 1 stops: DataError: no data on rank 0"
    assert first["other fails"] == "PeerFailedError: rank 1 failed, so rank 0 stops: DataError: no data on rank 1"
    assert second["other fails"] == "DataError: no data on rank 1"
    assert first["backend"] == second["backend"] == {"name": "library", "reason": "on rank 1: bad GPU"}
    assert first["none fails"] == second["none fails"] == "fine: made"
