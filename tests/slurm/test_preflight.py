"""What is wrong on one node is found, and named, before a model is loaded."""

from pathlib import Path

import pytest

from tests.helpers.tiny import write_recipe, write_world
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Job, read_json

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(write_world(tmp_path_factory.mktemp("preflight")), train__max_steps=3,
                        train__global_batch_size=6, train__micro_batch_size=1)


def _job(cluster: Cluster, runs: Path, recipe: Path, **settings: str) -> Job:
    """On the first two nodes, one of which is broken."""
    own = {"LLAVA_STAGE1_RECIPE": str(recipe), "LLAVA_NODES": "2", "LLAVA_PREFLIGHT_OPTIONS": "--wait-s 30"}
    return Job(cluster, runs, own | settings, flags="--exclusive --nodelist=node1,node2").submit()


def test_a_path_that_one_node_does_not_see_and_a_full_disk_on_another_are_named(tmp_path, cluster, recipe):
    """Both problems at once; the job does not start, and says which nodes to leave out."""
    data = recipe.parent / "data"
    cluster.run_on("node2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", data)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    cluster.run_on("node1", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", scratch)  # next to nothing is free
    try:
        job = _job(cluster, tmp_path / "runs", recipe, TMPDIR=str(scratch))
        job.wait("FAILED")
    finally:
        cluster.run_on("node2", "umount", data)
        cluster.run_on("node1", "umount", scratch)
    (start,) = job.starts()
    report = read_json(start.folder / "preflight.json")
    assert sorted(report["bad_nodes"]) == ["node1", "node2"]
    said = {node: " ".join(problem["message"] for problem in report["problems"] if problem["node"] == node)
            for node in ("node1", "node2")}
    assert str(data / "train.json") in said["node2"] and str(scratch) in said["node1"]
    assert start.end.decision == "stop" and "LLAVA_EXCLUDE_BAD_NODES=1" in start.end.why
    assert not (job.run_dir / "run.json").exists()


def test_a_bad_node_is_left_out_and_the_job_and_what_waits_for_it_go_on_elsewhere(tmp_path, cluster, recipe):
    data = recipe.parent / "data"
    cluster.run_on("node2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", data)
    try:
        own = {"LLAVA_STAGE1_RECIPE": str(recipe), "LLAVA_NODES": "3", "LLAVA_EXCLUDE_BAD_NODES": "1"}
        flags = f"--exclusive --exclude=node[5-{len(cluster.nodes)}]"
        job = Job(cluster, tmp_path / "runs", own, flags=flags).submit()
        output = f"--output={tmp_path}/waiting"
        waiting = cluster.sbatch(f"--dependency=afterany:{job.id}", output, "--wrap=date +%s.%N")
        job.wait()
        cluster.wait_for_state(waiting, "COMPLETED", seconds=180)
    finally:
        cluster.run_on("node2", "umount", data)
    first, second = job.starts()
    assert read_json(first.folder / "preflight.json")["bad_nodes"] == ["node2"]
    assert (first.end.reason, first.end.decision, second.end.reason) == ("failed", "resubmit", "finished")
    assert first.facts["nodes"] == "node[1-3]" and second.facts["nodes"] == "node[1,3-4]"
    assert second.facts["succeeds"] == first.facts["job"] != second.facts["job"]
    assert float((tmp_path / "waiting").read_text()) > second.end.time
