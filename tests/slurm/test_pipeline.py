"""The chain of jobs, from the quickstart's data to scores, on two nodes under ZeRO-3."""

import re

import pytest

from llava_ds.checkpoint.layout import list_steps
from llava_ds.config import find_recipe
from llava_ds.starts import list_starts
from tests.helpers.launch import ROOT
from tests.slurm.runs import Job, read_json

pytestmark = pytest.mark.slurm



@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, str]:
    """The quickstart's recipes with few steps, as a site's settings file names them."""
    folder = tmp_path_factory.mktemp("recipes")
    for stage in ("stage1", "stage2"):
        text, count = re.subn("max_steps: .*", "max_steps: 12", find_recipe(f"quickstart_{stage}").read_text())
        assert count == 1
        (folder / f"{stage}.yaml").write_text(text)
    file = folder / "settings.sh"
    file.write_text(
        f"LLAVA_NODES=2\nLLAVA_STAGE1_RECIPE={folder}/stage1.yaml\nLLAVA_STAGE2_RECIPE={folder}/stage2.yaml\n"
    )
    return {"LLAVA_SETTINGS": str(file)}


def test_the_pipeline_goes_from_data_to_scores(tmp_path, cluster, settings):
    chain = Job(cluster, tmp_path / "the chain's runs", settings)
    names = dict(line.removeprefix("job ").split(": ") for line in chain.submit_chain())
    assert list(names.values()) == ["generate", "stage1", "stage2", "merge", "evaluate"]
    *_, last = names
    cluster.wait_for_state(last, "COMPLETED", seconds=400)
    for stage in ("stage1", "stage2"):
        run = chain.runs / stage
        assert (run / "FINISHED").read_text() == "12\n"
        record = read_json(run / "run.json")
        assert record["world_size"] == 2 and record["ds_config"]["zero_optimization"]["stage"] == 3
        assert len(list(list_steps(run)[-1].glob("weights-*"))) == 2
        assert len({read_json(file)["nodes"] for file in run.glob("starts/*/start.json")}) == 1
    scores = read_json(chain.runs / "scores.json")
    assert scores["num_questions"]["name"] == 288, scores
    assert len((chain.runs / "predictions.jsonl").read_text().splitlines()) == sum(scores["num_questions"].values())
    assert "of them on each of 2 rank(s)" in next(chain.runs.glob("slurm-*-llava-evaluate.out")).read_text()


def test_sbatch_itself_takes_the_settings_and_a_stage_stops_where_the_one_before_is_not_finished(
    tmp_path, cluster, settings
):
    """The plain job submits one as large as the settings say. That finds no marker of stage 1, and tells it."""
    job = Job(cluster, tmp_path / "runs", settings)
    plain = cluster.sbatch(f"--output={tmp_path}/plain", "slurm/stage2.sh", env=job.environ(), cwd=ROOT)
    cluster.wait_for_state(plain, "COMPLETED", seconds=60)
    job.id = int(re.search(r"job (\d+): slurm/stage2.sh on 2 node", (tmp_path / "plain").read_text())[1])
    job.wait("FAILED")
    (start,) = list_starts(job.runs / "stage2")
    assert start.end.decision == "stop" and start.facts["job"] == str(job.id) and "[" in start.facts["nodes"]
    assert start.end.message == f"stage 1 is not finished: there is no {job.runs}/stage1/FINISHED"


def test_flags_of_sbatch_win_over_the_settings(tmp_path, cluster, settings):
    job = Job(cluster, tmp_path / "runs", settings)
    environ = job.environ() | {"LLAVA_HOME": str(ROOT)}
    job.id = cluster.sbatch("--nodes=3", ROOT / "slurm" / "stage2.sh", env=environ, cwd=tmp_path)
    job.wait("FAILED")
    (start,) = list_starts(job.runs / "stage2")
    assert start.facts["job"] == str(job.id) and len(cluster.hosts(job.id)) == 3
