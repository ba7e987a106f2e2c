"""The cluster that the other tests run on: its nodes are apart from each other, fail as machines do, and go."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import LOGIN, Cluster, ClusterError

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]

UP_AND_WAIT = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster.up(1)
cluster.sbatch("--output", "/dev/null", "--wrap", "sleep 60")
print("up", flush=True)
time.sleep(60)
"""


def find_processes(scratch: Path) -> list[str]:
    """The command lines of all processes that have the folder in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != psutil.Process().pid and any(str(scratch) in word for word in words):
                found.append(" ".join(process.cmdline()) or process.name())
    return found


def find_links() -> str:
    """What this machine, not a cluster, has of network links and namespaces with a name."""
    names = [path.name for folder in ("/run/netns", "/etc/netns") for path in sorted(Path(folder).glob("*"))]
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return f"{names}\n{links}\n{namespaces}"


def submit_ticks(cluster: Cluster, folder: Path, num_ticks: int, *options: str) -> tuple[int, Path]:
    """A job that writes a line every half second: its node, restarts and the tick; the job is running on return."""
    script, ticks = folder / "ticks.sh", folder / "ticks"
    script.write_text(f"""#!/bin/bash
srun bash -c 'for tick in $(seq {num_ticks}); do
  echo "$SLURMD_NODENAME ${{SLURM_RESTART_COUNT:-0}} $tick" >> {ticks}
  sleep 0.5
done'
""")
    job = cluster.sbatch(*options, "--output", folder / "%j.out", script)
    cluster.wait_for(lambda: ticks.exists(), 30, f"job {job} to tick")
    return job, ticks


def reaches(cluster: Cluster, node: str) -> bool:
    """Whether the login node's packets reach the node's slurmd."""
    command = ["timeout", "2", "bash", "-c", f"</dev/tcp/{node}/6818"]
    return cluster.login(*command, check=False).returncode == 0


def test_srun_reaches_two_nodes(cluster):
    """Each with its own hostname, its own address and the files of this machine."""
    lines = cluster.login("srun", "-N2", "bash", "-c", "echo $(hostname) $(hostname -I) $(pwd)", cwd=ROOT).stdout
    assert sorted(lines.splitlines()) == [f"node1 10.77.0.1 {ROOT}", f"node2 10.77.0.2 {ROOT}"]


def test_batch_job_leaves_what_its_user_sees(cluster, tmp_path):
    """The environment of sbatch arrives, a failure is seen at once, and the message shows what the job said."""
    job = cluster.sbatch("--output", tmp_path / "out", "--wrap", "echo said $WORD; exit 3", env={"WORD": "hello"})
    with pytest.raises(ClusterError, match=rf"(?s)job {job} is FAILED.*exit code 3:0.*said hello"):
        cluster.wait_for_state(job, "COMPLETED", seconds=30)
    assert cluster.job(job)["JobName"] == "wrap"
    assert cluster.hosts(job) == ["node1"]


def test_a_wait_that_is_in_vain_shows_the_queue(cluster, tmp_path):
    """With what was waited for and why the job does not run."""
    job = cluster.sbatch("-N4", "--exclusive", "--begin=now+1hour", "--job-name=later", "--wrap", "true")
    with pytest.raises(TimeoutError, match=rf"(?s)waited 0.1 s for: job {job} RUNNING.*later.*BeginTime"):
        cluster.wait_for_state(job, "RUNNING", seconds=0.1)


def test_command_that_hangs_is_ended(cluster):
    """And gives its allocation back."""
    with pytest.raises(TimeoutError, match="not done after 1 s"):
        cluster.login("srun", "-N4", "--exclusive", "sleep", "60", timeout=1)
    cluster.wait_until_idle(20)


def test_mount_on_one_node_is_seen_there_only(cluster, tmp_path):
    """By the jobs that run there later; /dev/shm is each node's own without that."""
    cluster.run_on("node2", "mount", "-t", "tmpfs", "tmpfs", tmp_path)
    try:
        cluster.run_on("node2", "touch", tmp_path / "mounted", "/dev/shm/of_node2")
        look = f"echo $SLURMD_NODENAME $(ls {tmp_path}) $(ls /dev/shm)"
        seen = cluster.login("srun", "-N3", "bash", "-c", look).stdout
        assert sorted(seen.splitlines()) == ["node1", "node2 mounted of_node2", "node3"]
        assert not list(tmp_path.iterdir())
        assert not Path("/dev/shm/of_node2").exists()
    finally:
        cluster.run_on("node2", "umount", tmp_path)
        cluster.run_on("node2", "rm", "-f", "/dev/shm/of_node2")


def test_crash_requeues_the_job_on_other_nodes(cluster, tmp_path):
    """Slurm finds out by itself that the node is silent; after a boot it takes jobs again."""
    job, ticks = submit_ticks(cluster, tmp_path, 60, "-N2", "--requeue")
    assert cluster.hosts(job) == ["node1", "node2"]
    cluster.crash("node2")
    with pytest.raises(ClusterError, match="node2 is off"):
        cluster.run_on("node2", "true")
    cluster.wait_for(lambda: " 1 " in ticks.read_text(), 90, f"job {job} to tick again")
    assert {line.split()[0] for line in ticks.read_text().splitlines() if " 1 " in line} <= {"node1", "node3", "node4"}
    assert cluster.job(job)["Restarts"] == "1"
    assert "DOWN" in cluster.node_states("node2")
    cluster.login("scancel", job)
    cluster.boot("node2")
    cluster.wait_until_idle(60)
    assert cluster.login("srun", "-wnode2", "hostname").stdout == "node2\n"


def test_node_without_network_goes_on_and_comes_back(cluster, tmp_path):
    """The job on it ticks while nobody can reach it, and is still its job afterwards."""
    job, ticks = submit_ticks(cluster, tmp_path, 9, "-wnode3")
    assert reaches(cluster, "node3")
    cluster.cut("node3")
    assert not reaches(cluster, "node3")
    assert reaches(cluster, "node2")
    before = len(ticks.read_text().splitlines())
    cluster.wait_for(lambda: len(ticks.read_text().splitlines()) > before + 1, 20, "ticks on a node that is cut off")
    cluster.heal("node3")
    cluster.wait_for(lambda: reaches(cluster, "node3"), 20, "a way to node3")
    assert cluster.wait_for_state(job, "COMPLETED", seconds=60)["Restarts"] == "0"


def test_node_that_is_set_down_loses_its_job(cluster, tmp_path):
    """At once, which is why tests use it; the node stays down until it is resumed."""
    job, _ = submit_ticks(cluster, tmp_path, 60, "--requeue", "-wnode1")
    cluster.set_down("node1", "a test of it")
    assert cluster.wait_for_state(job, "PENDING", seconds=10)["Restarts"] == "1"
    assert cluster.node_states("node1") == ["DOWN"]
    cluster.resume("node1")
    cluster.wait_until_idle(20)


def test_job_goes_on_when_the_controller_is_killed(cluster, tmp_path):
    """And is known to the controller that starts again."""
    job, ticks = submit_ticks(cluster, tmp_path, 16, "-N2")
    cluster.restart_controller()
    assert cluster.job(job)["JobState"] == "RUNNING"
    done = cluster.wait_for_state(job, "COMPLETED", seconds=60)
    assert done["Restarts"] == "0"
    assert sorted(ticks.read_text().splitlines()) == sorted(f"node{n} 0 {t}" for n in (1, 2) for t in range(1, 17))


def test_tidy_ends_what_a_job_left(cluster, tmp_path):
    """Without cgroups a background process outlives its job."""
    script = "setsid sleep 600 & touch started; sleep 600"
    cluster.sbatch("--output", "out", "--wrap", script, cwd=tmp_path)
    cluster.wait_for((tmp_path / "started").exists, 30, "the job's first line")
    cluster.tidy()
    assert "sleep 600" not in cluster.run_on("node1", "ps", "-ef").stdout
    assert cluster.login("squeue", "--noheader").stdout == ""


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a name short enough for sockets, which ``tmp_path`` has not."""
    return tmp_path_factory.mktemp("slurm")


def test_second_cluster_is_apart_and_leaves_nothing(cluster, scratch):
    """Its names and addresses are those of the first; a job that runs ends with it."""
    before = find_links()
    with Cluster(scratch, gpus=2) as second:
        second.up(1)
        assert second.login("srun", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES").stdout == "0,1\n"
        assert second.login("srun", "hostname").stdout == cluster.login("srun", "hostname").stdout == "node1\n"
        job = second.sbatch("--output", scratch / "out", "--wrap", "trap '' TERM; sleep 600")
        second.wait_for_state(job, "RUNNING", seconds=30)
        assert len(find_processes(scratch)) > 6
        assert find_links() == before
    assert find_processes(scratch) == []
    assert find_links() == before


def test_up_that_fails_leaves_nothing(cluster, scratch, tmp_path, monkeypatch):
    """The message says which step failed and what the daemons logged until then."""
    slurmd = tmp_path / "slurmd"
    slurmd.write_text("#!/bin/sh\necho no such luck >&2\nexit 4\n")
    slurmd.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    before = find_links()
    broken = Cluster(scratch)
    with pytest.raises(ClusterError, match=r"(?s)on node1, exit code 4: slurmd\nno such luck.*slurmctld.log"):
        broken.up(2)
    assert find_processes(scratch) == []
    assert find_links() == before
    with pytest.raises(ClusterError, match=f"{LOGIN} is off"):
        broken.login("true")


def test_killed_tests_leave_nothing(cluster, scratch):
    """Also no daemon and no job of theirs."""
    command = [sys.executable, "-c", UP_AND_WAIT, str(scratch)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout.readline() == "up\n"
        assert find_processes(scratch)
        tests.kill()
    end = time.monotonic() + 20
    while find_processes(scratch) and time.monotonic() < end:
        time.sleep(0.1)
    assert find_processes(scratch) == []
