"""Recipes and DeepSpeed JSON: strict, and every problem in one error."""

import json
from pathlib import Path

import pytest

from llava_ds.config import list_recipes, load_recipe, resolve_micro_batch
from llava_ds.engine.deepspeed_backend import zero_stage
from llava_ds.engine.ds_config import fill_bucket_sizes, read_ds_config, resolve_ds_config
from llava_ds.errors import ConfigError

DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def _autos(node):
    if isinstance(node, dict):
        return sum(_autos(value) for value in node.values())
    return node == "auto"


def test_there_are_recipes_and_configs():
    assert len(list_recipes()) >= 27
    assert len(DS_CONFIGS) >= 4


@pytest.mark.parametrize("ds_json", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_resolves_against_every_deepspeed_json(recipe, ds_json):
    config = load_recipe(recipe)
    world_size = 8 if config.train.global_batch_size % (8 * config.train.micro_batch_size) == 0 else 1
    resolved = resolve_ds_config(read_ds_config(ds_json), config.train, world_size, str(ds_json))
    fill_bucket_sizes(resolved, 4096)
    assert _autos(resolved) == 0
    assert resolved["train_batch_size"] == (
        resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"] * world_size
    )
    assert resolved["gradient_clipping"] == config.train.gradient_clipping
    assert resolved["bf16"]["enabled"] == (config.train.precision == "bf16")
    assert zero_stage(resolved) == int(ds_json.stem[4])


@pytest.mark.parametrize(
    ("recipe", "batch", "rate", "epochs", "template"),
    [
        ("paper_stage1_13b", 128, 2e-3, 1, "v0"),
        ("paper_stage2_13b", 32, 2e-5, 3, "v0"),
        ("paper_scienceqa_13b", 32, 2e-5, 12, "v0"),
        ("official_pretrain_13b", 128, 2e-3, 1, "plain"),
        ("official_finetune_full_schedule_7b", 128, 2e-5, 3, "v1"),
        ("official_v1_5_pretrain_7b", 256, 1e-3, 1, "plain"),
        ("official_v1_5_finetune_13b", 128, 2e-5, 1, "v1"),
    ],
)
def test_recipes_hold_the_published_values(recipe, batch, rate, epochs, template):
    config = load_recipe(recipe)
    train = config.train
    assert (train.global_batch_size, train.learning_rate, train.epochs) == (batch, rate, epochs)
    assert (config.data.template, train.weight_decay, train.warmup_ratio, train.lr_schedule) == (
        template, 0, 0.03, "cosine",
    )
    assert train.loss_averaging == ("per_micro_batch" if recipe.startswith("official") else "global_tokens")
    assert config.data.placement == ("front" if recipe.startswith("official") else "random")


def test_wrong_keys_and_values_are_listed_together(tmp_path):
    text = Path(load_recipe.__globals__["RECIPE_FOLDER"] / "quickstart_stage1.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("epochs:", "epoch:").replace("global_batch_size: 64", "global_batch_size: -1"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(file))
    assert "train.epoch: unknown key; did you mean 'epochs'?" in str(caught.value)
    assert "train.global_batch_size" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "did you mean 'learning_rate'"),
        ("train", "not of the form key.path=value"),
        ("name.x=1", "holds a value, not a group"),
        ("train.epochs=many", "train.epochs"),
        ("train.micro_batch_size=7", "not a multiple of"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("quickstart_stage1", [override])


def test_overrides_are_applied():
    config = load_recipe("quickstart_stage1", ["train.learning_rate=1e-4", "train.max_steps=3"])
    assert (config.train.learning_rate, config.train.max_steps) == (1e-4, 3)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean quickstart_stage"):
        load_recipe("quickstart_stag1")


def test_disagreements_of_the_json_are_listed_together(tmp_path):
    raw = json.loads(DS_CONFIGS[0].read_text()) | {
        "train_batch_size": 32, "gradient_clipping": 0.5, "optimiser": {}, "optimizer": {},
    }
    train = load_recipe("quickstart_stage1").train
    with pytest.raises(ConfigError) as caught:
        resolve_ds_config(raw, train, 1, "ds.json")
    message = str(caught.value)
    assert "train_batch_size: the JSON says 32, the recipe 64" in message
    assert "gradient_clipping: the JSON says 0.5, the recipe 1.0" in message
    assert "optimiser: unknown key" in message
    assert "optimizer: the recipe owns it" in message


def test_ranks_that_do_not_divide_the_batch():
    train = load_recipe("quickstart_stage1", ["train.global_batch_size=12", "train.micro_batch_size=3"]).train
    with pytest.raises(ConfigError, match=r"times 5 rank\(s\)") as caught:
        resolve_micro_batch(train, 5)
    assert "start one of [1, 2, 4, 6, 12] rank(s)" in str(caught.value)
    with pytest.raises(ConfigError, match=r"set train.micro_batch_size to one of \[1, 2, 4\], or start"):
        resolve_micro_batch(train, 3)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 32), (2, 32), (4, 16), (8, 8)])
def test_the_micro_batch_is_at_most_a_ranks_share(world_size, micro):
    for recipe in ("quickstart_stage1", "quickstart_stage2", "quickstart_blind"):
        assert resolve_micro_batch(load_recipe(recipe).train, world_size).micro_batch_size == micro
    paper = load_recipe("paper_stage1_7b").train
    assert resolve_micro_batch(paper, world_size) is paper


def test_broken_json(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"a": }')
    with pytest.raises(ConfigError, match=r"ds.json:1:7: not valid JSON"):
        read_ds_config(file)
    with pytest.raises(ConfigError, match="no such file"):
        read_ds_config(tmp_path / "none.json")
