"""Ranks wait for the work of rank 0 for as long as it takes, and hear of its failure."""

import os
import subprocess
import sys
from pathlib import Path

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
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == [
        "0: ['done by 0', 'no such thing']",
        "1: ['done by 1', 'rank 0 failed, so rank 1 stops: ConfigError: no such thing']",
    ]
