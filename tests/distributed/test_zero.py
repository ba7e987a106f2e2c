"""ZeRO 0 to 3 on 1 and 2 ranks: the same global batches give the same losses.

Each stage above 0 is started by a launcher once: deepspeed, torchrun, srun. The other runs are forked ranks.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ds.checkpoint.fragments import open_weights
from llava_ds.checkpoint.layout import list_steps, step_dir, step_number
from llava_ds.distributed import free_port
from tests.helpers.launch import (
    assert_all_fine,
    clean_environ,
    fork_alone,
    fork_ranks,
    launch,
    read_losses,
    train_script,
)
from tests.helpers.tiny import write_recipe, write_world

NUM_STEPS = 4
# fp32 sums in another order, through 4 steps of AdamW at a rate of 1e-3.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def reference(world) -> list[float]:
    assert_all_fine(fork_ranks(1, train_script(write_recipe(world), "zero0", world / "reference")))
    losses = read_losses(world / "reference")
    assert len(losses) == NUM_STEPS
    assert losses[-1] < losses[1]  # step 0 has rate 0
    return losses


def _assert_agrees(run_dir: Path, num_ranks: int, reference: list[float]) -> None:
    assert read_losses(run_dir) == pytest.approx(reference, abs=TOLERANCE)
    assert (run_dir / "loss.png").stat().st_size > 1000
    record = json.loads((run_dir / "run.json").read_text())
    assert (record["world_size"], record["num_samples"]) == (num_ranks, 11)


@pytest.mark.parametrize(
    ("zero", "num_ranks"), [("zero0", 2), ("zero1", 1), ("zero2", 1), ("zero3", 1), ("zero3_offload", 2)]
)
def test_losses_agree(world, reference, zero, num_ranks):
    run_dir = world / f"{zero}-{num_ranks}"
    assert_all_fine(fork_ranks(num_ranks, train_script(write_recipe(world), zero, run_dir)))
    _assert_agrees(run_dir, num_ranks, reference)


def test_the_deepspeed_launcher_starts_two_ranks_of_zero_3(world, reference):
    done = launch(write_recipe(world), "zero3", 2, world / "zero3-2")
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_agrees(world / "zero3-2", 2, reference)


def test_torchrun_starts_the_same_script(world, reference):
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command += train_script(write_recipe(world), "zero2", world / "torchrun")
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_agrees(world / "torchrun", 2, reference)


def test_the_variables_of_srun_alone_start_the_same_script(world, reference):
    command = [sys.executable, *train_script(write_recipe(world), "zero1", world / "srun")]
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "9695", "MASTER_ADDR": "127.0.0.1"}
    tasks = [
        subprocess.Popen(
            command,
            env=clean_environ() | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [task.communicate(timeout=240)[1] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    _assert_agrees(world / "srun", 2, reference)


def test_a_picture_that_does_not_decode_is_named_by_a_worker_without_a_traceback(world):
    data = world / "broken"
    shutil.copytree(world / "data", data)
    (data / "2.png").write_bytes(b"no picture")
    recipe = write_recipe(world, data__path=str(data / "train.json"), data__num_workers=2)
    done = launch(recipe, "zero0", 2, world / "broken_run")
    assert done.returncode != 0
    assert "DataError" in done.stderr
    assert str(data / "2.png") in done.stderr
    assert done.stderr.count("DataError: rank") == 1  # both ranks stop, one says it
    assert "Traceback" not in done.stderr
    assert [step_number(step) for step in list_steps(world / "broken_run")] == [0]


def test_too_many_bad_pictures_end_the_run_on_every_rank_and_lose_no_step(world):
    data = world / "mostly_broken"
    shutil.copytree(world / "data", data)
    for number in (4, 5, 6, 8, 9):
        whole = (data / f"{number}.png").read_bytes()
        (data / f"{number}.png").write_bytes(whole[: len(whole) // 2])  # begins as a picture does
    recipe = write_recipe(world, data__path=str(data / "train.json"), data__on_bad_sample="skip",
                          data__max_bad_frac=0.0, train__global_batch_size=2, train__micro_batch_size=1)
    ranks = fork_ranks(2, train_script(recipe, "zero3", world / "mostly_broken_run"))
    assert [rank.returncode for rank in ranks] == [1, 1]
    stderr = ranks[0].stderr + ranks[1].stderr
    assert stderr.count("data.max_bad_frac=0 allows") == 1
    assert "Traceback" not in stderr
    num_done = len(read_losses(world / "mostly_broken_run"))
    assert step_number(list_steps(world / "mostly_broken_run")[-1]) == num_done
    assert (f"step {num_done} is saved" in stderr) == (num_done > 0)


def test_stage_1_trains_the_projector_alone_and_stage_2_starts_from_it(world):
    first = write_recipe(world, train__trainable=["projector"])
    assert_all_fine(fork_ranks(2, train_script(first, "zero3", world / "one")))
    assert sorted(open_weights(step_dir(world / "one", NUM_STEPS))) == ["projector.bias", "projector.weight"]
    second = write_recipe(world, model__init_from=str(world / "one"))
    assert_all_fine(fork_ranks(2, train_script(second, "zero2", world / "two")))
    assert read_losses(world / "two")[0] < read_losses(world / "one")[0]


def test_a_second_run_sets_the_first_aside_and_skips_bad_records_with_a_count(world):
    data = world / "gaps"
    shutil.copytree(world / "data", data)
    (data / "0.png").unlink()
    (data / "1.png").write_bytes(b"no picture")
    whole = (data / "2.png").read_bytes()
    (data / "2.png").write_bytes(whole[: len(whole) // 2])  # begins as a picture does
    records = json.loads((data / "train.json").read_text())
    (data / "train.json").write_text(json.dumps([*records, {"id": "empty", "conversations": []}]))
    recipe = write_recipe(world, data__path=str(data / "train.json"), data__on_bad_sample="skip", train__epochs=1)
    script = train_script(recipe, "zero0", world / "again")
    assert_all_fine([fork_alone(script)])
    command = [sys.executable, *script]  # the second as a user starts it, without a launcher
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "held an earlier run" in done.stdout
    for run_dir in (world / "again", world / "again.1"):
        record = json.loads((run_dir / "run.json").read_text())
        assert record["num_samples"] == 9
        assert record["skipped"] == {
            "image file is missing": 1, "image does not decode": 1, "'conversations' is empty": 1,
        }
        assert (run_dir / "checkpoints" / "step-00000003" / "COMPLETE").is_file()
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert (metrics[-1]["bad_samples"], metrics[-1]["samples_seen"]) == (1, 9)
    assert f"id='s2': image {data / '2.png'} does not decode" in done.stdout


def test_a_blind_run_leaves_the_feature_cache_to_those_that_see(world, reference):
    cache = {"data__feature_cache": str(world / "features")}
    for name, changes in (("blind", {"model__zero_features": True}), ("cached", {})):
        recipe = write_recipe(world, **changes, **cache)
        assert_all_fine([fork_alone(train_script(recipe, "zero0", world / name))])
    assert read_losses(world / "cached") == pytest.approx(reference, abs=TOLERANCE)
    assert read_losses(world / "blind") != pytest.approx(reference, abs=100 * TOLERANCE)


def test_16_bit_training_takes_the_same_steps_at_every_zero_stage(world):
    losses = []
    for zero in ("zero0", "zero1"):
        recipe = write_recipe(world, train__precision="bf16")
        assert_all_fine([fork_alone(train_script(recipe, zero, world / f"bf16-{zero}"))])
        losses.append(read_losses(world / f"bf16-{zero}"))
    # Steps of bf16 weights are about 0.4 % wide; one more of Adam's steps was a difference of 0.04.
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_a_loss_that_is_not_finite_ends_the_run(world):
    done = fork_alone(train_script(write_recipe(world, train__learning_rate=1e30), "zero0", world / "diverged"))
    assert done.returncode == 1
    assert "ConfigError: the loss of step" in done.stderr
    assert "Traceback" not in done.stderr
    assert [step_number(step) for step in list_steps(world / "diverged")] == [0]
    assert len(read_losses(world / "diverged")) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.learning_rat=1"], "did you mean 'learning_rate'"),
        (["--set", "data.path=none.json"], "no such file"),
        (["--set", "model.init_from=nowhere"], "no such folder"),
        (["--set", "data.template=v9"], "unknown template 'v9'"),
        (["--set", "data.image_root=elsewhere"], "image file(s) are missing"),
        (["--set", "train.micro_batch_size=4", "--set", "train.global_batch_size=6"], "not a multiple of"),
    ],
)
def test_bad_input_ends_with_its_reason_and_leaves_nothing(world, options, message):
    run_dir = world / "bad"
    done = fork_alone(train_script(write_recipe(world), "zero0", run_dir, *options))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
