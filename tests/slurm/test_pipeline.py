"""The chain of jobs, from the quickstart's data to scores, on two nodes under ZeRO-3."""

import re

import pytest

from llava_ds.checkpoint.layout import list_steps
from llava_ds.config import find_recipe
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
    chain = Job(cluster, tmp_path / "runs", settings)
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


def test_a_chain_stops_where_a_stage_does_not_finish(tmp_path, cluster, settings):
    """Stage 2 finds no marker of stage 1, and says so, whatever the exit codes were."""
    job = Job(cluster, tmp_path / "runs", settings).submit("slurm/stage2.sh")
    job.wait("FAILED")
    (start,) = (job.runs / "stage2" / "starts").iterdir()
    end = read_json(start / "end.json")
    assert end["decision"] == "stop"
    assert end["message"] == f"stage 1 is not finished: there is no {job.runs}/stage1/FINISHED"
