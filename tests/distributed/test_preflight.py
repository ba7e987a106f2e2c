"""Real processes, one for each node as srun starts them: what is wrong with one is named, and all end alike."""

import json
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from llava_ds.distributed import free_port
from tests.helpers.launch import ROOT, clean_environ

pytestmark = pytest.mark.slow

NODES = ["alpha", "beta", "gamma"]
FAULTY = Path(__file__).with_name("preflight_job.py")


@pytest.fixture
def world(tmp_path):
    """A recipe with relative paths, and a working folder for each node that holds what it names."""
    for node in NODES:
        folder = tmp_path / node
        for name in ("tower", "llm", "cache"):
            (folder / name).mkdir(parents=True)
        (folder / "tower" / "model.safetensors").write_bytes(b"weights")
        (folder / "train.json").write_text("[]")
    recipe = {
        "name": "tiny",
        "model": {"vision_tower": "./tower", "llm": "./llm", "projector": "linear"},
        "data": {"path": "train.json", "template": "v1", "placement": "front", "num_workers": 0},
        "train": {"trainable": ["projector"], "global_batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return tmp_path


class Job:
    """The processes of one preflight: ranks of ``NODES``, of which some may never start."""

    def __init__(self, world, *options, ranks=(0, 1, 2), world_size=3, faults=None, environs=None):
        self.world, self.world_size, self.port = world, world_size, free_port()
        self.faults, self.environs, self.processes = faults or {}, environs or {}, {}
        self.report = world / "report" / f"{self.port}.json"
        for rank in ranks:
            self.start(rank, *options)

    def start(self, rank, *options):
        """Starts one rank, as srun does."""
        fixed = ["--recipe", self.world / "recipe.yaml", "--run-dir", self.world / "runs" / "one"]
        fixed += ["--report", self.report, "--nodes", ",".join(NODES[:self.world_size])]
        fixed += ["--min-free-gib", 0, "--min-tmp-gib", 0]
        environ = clean_environ() | {
            "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(self.world_size), "SLURM_LOCALID": "0",
            "SLURM_STEP_ID": "0", "SLURMD_NODENAME": NODES[rank], "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port - 1), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
            "LLAVA_DS_CACHE": str(self.world / NODES[rank] / "cache"), "FAULT": str(self.faults.get(rank)),
        } | self.environs.get(rank, {})
        script = FAULTY if rank in self.faults else ROOT / "tools" / "preflight"
        self.processes[rank] = subprocess.Popen(
            [sys.executable, str(script), *map(str, [*fixed, *options])], cwd=self.world / NODES[rank], env=environ,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def end(self, limit_s=150):
        """Exit codes by rank, and the JSON report, which is None where there is none."""
        self.out = {}
        try:
            for rank, process in self.processes.items():
                self.out[rank] = process.communicate(timeout=limit_s)
        finally:
            for process in self.processes.values():
                process.kill()
        codes = {rank: process.returncode for rank, process in self.processes.items()}
        return codes, json.loads(self.report.read_text()) if self.report.exists() else None


def _problems(report):
    return [(problem["node"], problem["kind"]) for problem in report["problems"]]


def test_it_starts_without_what_takes_long_to_import():
    heavy = {"transformers", "deepspeed", "open_clip"}
    code = f"import sys, llava_ds.cluster.preflight; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=clean_environ(), cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_three_good_nodes_are_fine_and_measured(world):
    job = Job(world, "--slow-frac", 0, "--limit-s", 120)
    codes, report = job.end()
    assert codes == {0: 0, 1: 0, 2: 0}, job.out
    assert (report["code"], report["bad_nodes"], report["suspects"], report["problems"]) == (0, [], [], [])
    assert [node["node"] for node in report["nodes"]] == NODES
    for rank, node in enumerate(report["nodes"]):
        assert {rank, *(partner for partner, _ in node["links"]["pairs"])} == {0, 1, 2}
        assert node["links"]["best_bytes_per_s"] == max(rate for _, rate in node["links"]["pairs"]) > 1e6
        assert node["links"]["all_reduce_bytes_per_s"] > 1e6
        assert node["links"]["wrong_sum"] == ""
        assert node["paths"]["data.path"]["path"] == str(world / NODES[rank] / "train.json")
    lines = job.out[0][0].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == NODES
    assert all("GB/s" in line and "free for the run" in line for line in lines[1:4])
    assert lines[4:] == ["preflight: all is well"]
    assert [job.out[rank] for rank in (1, 2)] == [("", ""), ("", "")]


def test_every_bad_node_is_named_at_once(world):
    (world / "beta" / "train.json").unlink()
    (world / "gamma" / "tower" / "model.safetensors").write_bytes(b"other weights")
    job = Job(world, "--slow-frac", 0, "--limit-s", 120, environs={2: {"LLAVA_DS_CACHE": "/proc/nothing"}})
    codes, report = job.end()
    assert codes == {0: 3, 1: 3, 2: 3}, job.out
    assert _problems(report) == [("beta", "missing_path"), ("gamma", "content"), ("gamma", "not_writable")]
    assert (report["code"], report["bad_nodes"], report["suspects"]) == (3, ["beta", "gamma"], [])
    assert f"data.path={world}/beta/train.json is not there, on 1 of 3 nodes" in report["problems"][0]["message"]
    assert "folder with 13 bytes in 1 entries" in report["problems"][1]["message"]
    assert "but folder with 7 bytes in 1 entries" in report["problems"][1]["message"]
    assert "cache /proc cannot be written" in report["problems"][2]["message"]
    assert all(node["links"] for node in report["nodes"])
    assert "preflight: start without beta,gamma" in job.out[0][0]


def test_who_never_comes_or_never_answers_is_named_and_a_lost_rank_0_holds_nobody(world):
    missing = Job(world, "--wait-s", 120, ranks=(1,), faults={1: "look"})
    lost = Job(world, "--wait-s", 120, world_size=2, ranks=(0, 1), faults={0: "look"})
    store = TCPStore("127.0.0.1", lost.port, None, False, timedelta(seconds=60), wait_for_workers=False)
    store.wait(["here/0", "here/1"])
    lost.processes[0].kill()
    started = time.monotonic()
    codes, _ = lost.end()
    assert time.monotonic() - started < 15
    assert codes == {0: -9, 1: 3}
    assert "rank 1 on beta has no connection to rank 0 at 127.0.0.1" in lost.out[1][1]

    missing.start(0, "--wait-s", 5)  # by now rank 1 is there, and waits for it
    codes, report = missing.end()
    assert codes == {0: 3, 1: 3}, missing.out
    assert _problems(report) == [("beta", "no_report"), ("gamma", "no_report")]
    assert (report["bad_nodes"], report["suspects"]) == (["beta", "gamma"], [])
    assert "did not report within 5 s; it was looking at data.path=/mnt/dead." in report["problems"][0]["message"]
    assert "it did not come within 5 s; 2 of 3 nodes did." in report["problems"][1]["message"]
    assert [node["links"] for node in report["nodes"]] == [None]


def test_settings_that_are_wrong_everywhere_name_no_node_and_a_node_that_hangs_is_named(world):
    wrong = Job(world, "--set", "train.epochs=many", ranks=(0,), world_size=1)
    hanging = Job(world, "--limit-s", 4, faults={2: "links"})
    codes, report = wrong.end()
    assert codes == {0: 1}, wrong.out
    assert _problems(report) == [(None, "failed")]
    assert (report["bad_nodes"], report["suspects"]) == ([], [])
    assert "train.epochs: " in report["problems"][0]["message"]

    codes, report = hanging.end()
    assert codes == {0: 3, 1: 3, 2: 3}, hanging.out
    assert _problems(report) == [("gamma", "stuck")]
    assert report["bad_nodes"] == ["gamma"]
    assert "it stands at 'starting the device'" in report["problems"][0]["message"]
