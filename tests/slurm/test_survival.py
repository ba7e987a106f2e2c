"""What clusters do to runs: each is lost at most back to its last checkpoint, and ends as if nothing had happened."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.tiny import write_recipe, write_world
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Job, assert_same_end

pytestmark = pytest.mark.slurm

NUM_STEPS, SAVED_EVERY = 90, 10


class World:
    """The tiny world and its jobs."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.root = write_world(root)
        self.cluster = cluster
        self.recipe = write_recipe(root, train__max_steps=NUM_STEPS, train__epochs=1000, train__save_steps=SAVED_EVERY,
                                   train__micro_batch_size=1, data__num_workers=1)

    def job(self, name: str, *options: str, flags: str = "", **settings: str) -> Job:
        """A job of its own folder, submitted. The preflight has its own tests."""
        settings = {"LLAVA_STAGE1_RECIPE": str(self.recipe), "LLAVA_PREFLIGHT": "0", "LLAVA_NODES": "2"} | settings
        return Job(self.cluster, self.root / name, settings, options, f"--exclusive {flags}").submit()


@pytest.fixture(scope="module")
def world(tmp_path_factory, cluster) -> World:
    return World(tmp_path_factory.mktemp("survival"), cluster)


def undisturbed(world: World) -> Job:
    """But for slurmctld, which is killed and started again."""
    job = world.job("undisturbed")
    job.wait_for_step(5)
    world.cluster.restart_controller()
    job.wait()
    assert job.ends() == [("finished", "done")]
    return job


def time_limit(world: World) -> None:
    """Its time is over before its steps are."""
    job = world.job("time limit", flags="--time=60 --signal=B:USR1@110")
    job.wait_for_step(15)
    minutes = int(time.monotonic() - job.began + 25) // 60 + 1  # less than 110 s are left: the warning comes now
    world.cluster.login("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    world.cluster.wait_for(lambda: job.ends()[0][0], 120, "the end of the first start")
    world.cluster.login("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.wait()
    ends = job.ends()
    assert ends[:-1] == [("stopped", "requeue")] * (len(ends) - 1) and ends[-1] == ("finished", "done")
    # What was asked to end saved the step that it had reached, not one that was due.
    assert job.starts()[1].facts["step"] == job.starts()[0].end.step >= 15
    assert job.starts()[1].facts["restart"] == 1


def preemption(world: World) -> None:
    """A job that goes first takes its nodes."""
    job = world.job("preemption")
    job.wait_for_step(15)
    nodes = ",".join(world.cluster.hosts(job.id))
    urgent = world.cluster.sbatch("--partition=urgent", f"--nodelist={nodes}", "--nodes=2", "--output=/dev/null",
                                  "--wrap=sleep 2")
    world.cluster.wait_for_state(urgent, "COMPLETED", seconds=120)
    job.wait()
    assert job.ends() == [("stopped", "requeue"), ("finished", "done")]


def not_requeued(world: World) -> None:
    """A job that Slurm may not requeue is submitted anew, with what it asked for; what waits for it waits on."""
    job = world.job("not requeued", flags="--no-requeue --signal=B:USR1@30")
    output = world.root / "waiting"
    waiting = world.cluster.sbatch(f"--dependency=afterany:{job.id}", f"--output={output}", "--wrap=date +%s.%N")
    job.wait_for_step(15)
    world.cluster.login("scancel", "--batch", "--signal=USR1", str(job.id))
    job.wait()
    first, second = job.starts()[0], job.wait_for_start(2)
    job.id = int(second.facts["job"])
    assert second.facts["succeeds"] == first.facts["job"] != second.facts["job"]
    assert second.facts["step"] == first.end.step >= 15
    job.wait()
    assert job.ends() == [("stopped", "requeue"), ("finished", "done")]
    assert world.cluster.job(job.id)["Requeue"] == "0"
    world.cluster.wait_for_state(waiting, "COMPLETED", seconds=60)
    assert float(output.read_text()) > job.starts()[1].end.time


def node_crash(world: World) -> None:
    """A node loses its power; Slurm itself starts the job on others."""
    job = world.job("node crash")
    job.wait_for_step(25)
    nodes = world.cluster.hosts(job.id)
    world.cluster.crash(nodes[1])
    second = job.wait_for_start(2)
    assert nodes[1] not in world.cluster.hosts(job.id)
    job.wait()
    # Ranks that lost their peer may have had the time to say so.
    assert [reason in ("lost", "failed") for reason, _ in job.ends()] == [True, False], job.ends()
    assert job.ends()[-1] == ("finished", "done")
    assert second.facts["step"] >= 20


def cut_link(world: World) -> None:
    """The node of rank 0 is cut off while its processes live on."""
    job = world.job("cut link", "--set", "train.hang_timeout_s=20")
    job.wait_for_step(25)
    nodes = world.cluster.hosts(job.id)
    world.cluster.cut(nodes[0])
    job.wait_for_start(2)
    assert nodes[0] not in world.cluster.hosts(job.id)
    job.wait()
    world.cluster.heal(nodes[0])
    assert job.ends()[-1] == ("finished", "done")


def rank_dies(world: World) -> None:
    """A rank is killed once: the job ends in seconds and starts again; killed again at the same place, it stops."""
    job = world.job("rank dies", "--set", "train.save_steps=1000")
    for start in (1, 2):
        job.wait_for_step(start, job.wait_for_start(start))
        _kill_rank(world.cluster, job, "-KILL")
    job.wait("FAILED")
    assert job.ends() == [("failed", "requeue"), ("failed", "stop")]
    end = job.starts()[-1].end
    assert "killed by signal 9" in end.message and "the same way 2 times in a row without a new" in end.why


def rank_hangs(world: World) -> None:
    """A process of a rank is stopped: the watchdog names it, and the next start goes on."""
    job = world.job("rank hangs", "--set", "train.hang_timeout_s=20")
    job.wait_for_step(15)
    name = world.cluster.hosts(job.id)[1]
    _kill_rank(world.cluster, job, "-STOP")
    job.wait()
    assert job.ends() == [("hung", "requeue"), ("finished", "done")]
    assert f"rank 1 on {name} has given no sign of life" in job.starts()[0].end.message


def cancelled(world: World) -> None:
    """A user's scancel saves, and nothing starts the job again."""
    job = world.job("cancelled")
    job.wait_for_step(15)
    world.cluster.login("scancel", str(job.id))
    job.wait("CANCELLED")
    world.cluster.wait_for(lambda: job.ends()[0][0], 30, "the end of the start")
    time.sleep(5)
    (start,) = job.starts()
    assert (start.end.reason, start.end.decision) == ("stopped", None) and start.end.step >= 15
    assert job.committed() == start.end.step


def _kill_rank(cluster: Cluster, job: Job, signal: str) -> None:
    """Signals the rank of the job's second node."""
    cluster.run_on(cluster.hosts(job.id)[1], "pkill", signal, "-f", f"^python llava_ds/train.py .*{job.run_dir}")


SURVIVED: tuple[Callable[[World], None], ...] = (cut_link, node_crash, time_limit, preemption, not_requeued,
                                              rank_hangs)
AT_ONCE = 4
"""Scenarios: more would only slow each other down, until Slurm's daemons wait too long for one another."""


def test_runs_survive_what_clusters_do_and_stop_where_they_must(world):
    """Several at once, on nodes of their own: much of each is waiting."""
    expected = undisturbed(world)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {scenario.__name__: pool.submit(scenario, world) for scenario in (*SURVIVED, rank_dies, cancelled)}
    errors = {name: future.exception() for name, future in running.items() if future.exception()}
    for name, error in errors.items():
        print(f"--- {name}: {type(error).__name__}: {error}")
    assert not errors, list(errors)
    for scenario in SURVIVED:
        assert_same_end(world.root / scenario.__name__.replace("_", " ") / "stage1", expected.run_dir)
