"""Ranks as each launcher states them, and what is said when it states only a part."""

import pytest

from llava_ds.distributed import Ranks, apply_launcher_environment
from llava_ds.errors import ConfigError

SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "40123",
    "MASTER_ADDR": "node7",
}
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}


def _without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_a_launcher_is_taken_as_it_is_even_under_srun():
    environ = SRUN | TORCHRUN
    assert apply_launcher_environment(environ) == Ranks(5, 1, 8)
    assert environ == SRUN | TORCHRUN


def test_a_launcher_that_gives_no_local_rank_means_the_rank():
    environ = _without(TORCHRUN, "LOCAL_RANK")
    assert apply_launcher_environment(environ) == Ranks(5, 5, 8)
    assert environ["LOCAL_RANK"] == "5"


def test_srun_gives_ranks_and_a_port_that_is_the_same_in_every_task_of_a_job():
    environ = dict(SRUN)
    assert apply_launcher_environment(environ) == Ranks(3, 1, 4)
    assert environ == SRUN | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "20123"}
    chosen = SRUN | {"MASTER_PORT": "1234"}
    apply_launcher_environment(chosen)
    assert chosen["MASTER_PORT"] == "1234"


def test_srun_with_one_task_needs_no_address():
    environ = _without(SRUN, "MASTER_ADDR", "SLURM_JOB_ID") | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert apply_launcher_environment(environ) == Ranks(0, 1, 1)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "20000")


@pytest.mark.parametrize("environ", [{}, _without(SRUN, "SLURM_STEP_ID")], ids=["no launcher", "sbatch without srun"])
def test_otherwise_one_rank_on_a_free_port(environ):
    first, second = dict(environ), dict(environ)
    assert apply_launcher_environment(first) == apply_launcher_environment(second) == Ranks(0, 0, 1)
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(first["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (_without(SRUN, "MASTER_ADDR"), r"srun started 4 ranks, but MASTER_ADDR is not set.\n  Export MASTER_ADDR="),
        (_without(SRUN, "SLURM_NTASKS", "SLURM_LOCALID"), "SLURM_NTASKS, SLURM_LOCALID is not set; start every"),
        (_without(TORCHRUN, "WORLD_SIZE"), "RANK is set but WORLD_SIZE is not; start with deepspeed"),
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not; start with"),
    ],
)
def test_a_part_of_the_variables_is_refused_with_the_names_of_the_rest(environ, message):
    with pytest.raises(ConfigError, match=message):
        apply_launcher_environment(environ)
