"""What is wrong is said before anything is built or written: never a traceback, never a half-made folder."""

import fcntl
from pathlib import Path

import pytest

from llava_ds.config import load_recipe
from llava_ds.distributed import Ranks
from llava_ds.engine import run_record
from llava_ds.engine.ds_config import read_ds_config, resolve_ds_config
from llava_ds.engine.inputs import check_inputs
from llava_ds.engine.loop import Progress
from llava_ds.engine.run_lock import LOCK_FILE
from llava_ds.engine.run_record import _claim, check_run_dir
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.vision_tower import check_tower
from tests.helpers.tiny import write_recipe

RANKS = Ranks(0, 0, 1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"zero_optimization": {"stag": 3}}, "zero_optimization.stag: Extra inputs"),
        ({"zero_optimization": 3}, "zero_optimization: must be an object, got 3"),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage: .*got 'three'"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage: .*got 5"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size: .*got 'big'"),
        ({"fp16": {"loss_scal": 1}}, "loss_scal"),
        ({"aio": 3}, "aio: must be an object, got 3"),
        ({"communication_data_type": 3}, "DeepSpeed: AttributeError"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights: unknown key"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
         "offload_optimizer.device: 'nvme' has no checkpoints here"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
         "offload_optimizer.ratio: 0.5 has no checkpoints here"),
    ],
)
def test_a_deepspeed_json_that_deepspeed_refuses(raw, message):
    with pytest.raises(ConfigError, match=message):
        resolve_ds_config(raw, load_recipe("quickstart_stage1").train, 1, "ds.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\"a\": \"\xff\"}", "not UTF-8"),
        (b"{\"bf16\": {\"enabled\": true, \"enabled\": false}}", "'enabled': stands twice"),
    ],
)
def test_a_deepspeed_json_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_ds_config(tmp_path / "ds.json")


@pytest.mark.parametrize(
    "override",
    ["train.epochs=.inf", "train.epochs=.nan", "train.learning_rate=.inf", "train.weight_decay=.nan",
     "train.adam_betas=[0.9, 1.0]", "train.adam_betas=[-0.1, 0.9]", "name=..", "name=."],
)
def test_values_that_no_run_can_have(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_recipe("quickstart_stage1", [override])


def test_quoted_text_stays_text_and_short_exponents_are_numbers():
    config = load_recipe("quickstart_stage1", ['name="1e3"', "train.learning_rate=1e-3"])
    assert (config.name, config.train.learning_rate) == ("1e3", 1e-3)


def test_a_key_that_stands_twice_in_a_recipe(tmp_path):
    file = write_recipe(tmp_path)
    file.write_text("name: a\ntrain:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(ConfigError, match="'epochs' stands twice"):
        load_recipe(str(file))


def test_an_override_below_a_value_names_the_known_keys():
    with pytest.raises(ConfigError, match="known keys: vision_tower, vision_pretrained"):
        load_recipe("quickstart_stage1", ["model.llm.x=1"])


@pytest.mark.parametrize("tag", [None, "nonsense"])
def test_an_open_clip_tower_needs_a_known_tag(tag):
    with pytest.raises(ConfigError, match="openai"):
        check_tower("ViT-B-32", tag)
    check_tower("ViT-B-32", "openai")


def test_inputs_that_are_missing_are_named_together(tmp_path):
    (tmp_path / "tower").mkdir()
    config = load_recipe(
        str(write_recipe(tmp_path, data__template="v9", data__path="none.json", data__image_root="nowhere"))
    )
    with pytest.raises(DataError) as caught:
        check_inputs(config)
    for text in ("unknown template 'v9'", "none.json: no such file", "nowhere: no such folder"):
        assert text in str(caught.value)


def test_run_folders_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in (".", "..", "/", "file", "file/below"):
        with pytest.raises(ConfigError, match="--run-dir"):
            check_run_dir(Path(name), RANKS)
    with pytest.raises(ConfigError, match="cannot be written"):
        _claim(tmp_path / "file" / "below")
    check_run_dir(tmp_path / "new" / "run", RANKS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_takes_one_run_at_a_time_and_sets_a_finished_one_aside(tmp_path):
    run_dir = tmp_path / "run"
    first = _claim(run_dir)
    (run_dir / "run.json").write_text("{}")
    for attempt in (lambda: check_run_dir(run_dir, RANKS), lambda: _claim(run_dir)):
        with pytest.raises(ConfigError, match="another --run-dir, or stop"):
            attempt()
    assert not (tmp_path / "run.1").exists()
    first.release()
    check_run_dir(run_dir, RANKS)
    second = _claim(run_dir)
    assert (tmp_path / "run.1" / "run.json").exists()
    assert [path.name for path in run_dir.iterdir()] == [LOCK_FILE]
    second.release()


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    _claim(tmp_path / "run").release()
    assert "no locks here" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_stage_1_hands_its_own_folder_to_stage_2(size):
    command = load_recipe(f"paper_stage1_{size}").next_command
    assert command.endswith(f"--recipe paper_stage2_{size} --set model.init_from={{run_dir}}")


def test_the_next_command_is_quoted_for_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_record, "plot_loss", lambda *_: None)
    monkeypatch.setattr(run_record, "read_metrics", lambda _: [])
    config = load_recipe("quickstart_stage1")
    (tmp_path / "my run").mkdir()
    run_record.finish_run(tmp_path / "my run", config, Progress(step=1, loss=0.5), 1.0, RANKS)
    assert f"model.init_from='{tmp_path}/my run'" in capsys.readouterr().out
