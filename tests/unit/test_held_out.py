"""Which samples are held out and how they are scored: the same whatever the ranks, micro-batches and packing."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_ds.config import EvalConfig, RunConfig, load_recipe
from llava_ds.data import build
from llava_ds.data.build import build_training_data
from llava_ds.data.held_out import hold_out
from llava_ds.data.images import ImageTransform
from llava_ds.distributed import Ranks
from llava_ds.engine.evaluation import number_answers, score_batch
from llava_ds.engine.inputs import check_inputs
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.build import build_model, load_tokenizer
from llava_ds.text.placement import sample_key
from tests.helpers.teacher_forced import evaluate_reference
from tests.helpers.tiny import IMAGE_SIZE, write_data, write_recipe, write_world

TRANSFORM = ImageTransform(IMAGE_SIZE, (0.5,) * 3, (0.5,) * 3, "square", "bicubic")
SHAPE = (9, 32)
CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = write_world(tmp_path_factory.mktemp("held_out"))
    write_data(root / "held", 7)
    return root


def _config(world: Path, evaluation: dict, **changes) -> RunConfig:
    file = write_recipe(world, **changes)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eval": evaluation}))
    return load_recipe(str(file))


def _own(world: Path, **more) -> dict:
    return {"steps": 2, "path": str(world / "held" / "train.json"), **more}


def _data(config: RunConfig, monkeypatch, packing: str = "packed", ranks: Ranks = ALONE, compute=None):
    monkeypatch.setattr(build, "run_on_main_first", lambda _, work: work())  # other ranks are not there to wait for
    monkeypatch.setattr(build, "check_agreement", lambda *_: None)
    tokenizer = load_tokenizer(config.model.llm)
    return build_training_data(config, packing, tokenizer, TRANSFORM, SHAPE, "key", compute, ranks)


def _keys(ids) -> np.ndarray:
    return np.array([sample_key(one) for one in ids], dtype=np.uint64)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"steps": 1}, r"give one of eval.path, eval.holdout_frac, eval.holdout_samples; got \[\]"),
        ({"steps": 1, "path": "x", "holdout_frac": 0.1}, r"got \['eval.path', 'eval.holdout_frac'\]"),
        ({"steps": 1, "holdout_samples": 3, "split": "val"}, "eval.split belongs to eval.path"),
        ({"steps": 0, "path": "x"}, "eval.steps: Input should be greater than or equal to 1, got 0"),
        ({"path": "x"}, "eval.steps: Field required"),
        ({"steps": 1, "holdout_frac": 1.0}, "eval.holdout_frac: .*less than 1"),
        ({"step": 1, "path": "x", "steps": 1}, "eval.step: unknown key; did you mean 'steps'"),
    ],
)
def test_a_wrong_group_is_refused(tmp_path, evaluation, message):
    with pytest.raises(ConfigError, match=message):
        _config(tmp_path, evaluation)


def test_a_share_is_held_out_by_seed_and_id_alone():
    keys = _keys(f"id{n}" for n in range(20_000))
    settings = EvalConfig(steps=1, holdout_frac=0.1)
    held_out = hold_out(keys, 3, settings)
    assert 1830 < held_out.sum() < 2170  # four standard deviations around 2000
    assert np.array_equal(hold_out(keys[5000:], 3, settings), held_out[5000:])
    assert np.array_equal(hold_out(keys[::-1], 3, settings), held_out[::-1])
    other = hold_out(keys, 4, settings)
    assert 100 < (other & held_out).sum() < 300  # another seed, another tenth
    assert np.all(hold_out(keys, 3, EvalConfig(steps=1, holdout_frac=0.2))[held_out])  # a larger share holds it


def test_a_number_of_samples_is_held_out_and_one_id_is_not_torn():
    keys = _keys(f"id{n}" for n in range(100))
    settings = EvalConfig(steps=1, holdout_samples=7)
    assert hold_out(keys, 3, settings).sum() == 7
    assert hold_out(np.repeat(keys, 3), 3, settings).sum() == 9  # 7 samples are not three times some ids
    assert not hold_out(keys, 3, EvalConfig(steps=1, path="x")).any()
    assert not hold_out(keys, 3, None).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"holdout_samples": 100}, "holdout_samples=100 leaves none of 100 samples to train on"),
     ({"holdout_frac": 1e-9}, "holdout_frac=1e-09 holds out none of 100 samples")],
)
def test_neither_side_may_be_empty(settings, message):
    with pytest.raises(ConfigError, match=message):
        hold_out(_keys(f"id{n}" for n in range(100)), 3, EvalConfig(steps=1, **settings))


def _ids(stream) -> Counter:
    return Counter(name for batch in stream for name in batch.sample_ids)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_held_out_is_evaluated_and_not_trained_on(world, monkeypatch, world_size):
    config = _config(world, {"steps": 2, "holdout_samples": 3}, train__epochs=1, train__max_steps=None)
    ranks = [Ranks(rank, rank, world_size) for rank in range(world_size)]
    data = [_data(config, monkeypatch, ranks=rank) for rank in ranks]
    evaluated = sum((_ids(one.eval.loader) for one in data), Counter())
    trained = sum((_ids(one.loader) for one in data), Counter())
    assert len(evaluated) == 3
    assert evaluated + trained == Counter(f"s{n}" for n in range(11))
    assert sum((_ids(one.eval.loader) for one in data), Counter()) == evaluated  # a second pass gives them again
    assert data[0].plan.num_samples == 8
    whole = _data(_config(world, _own(world)), monkeypatch)
    assert whole.plan.num_samples == 11 and whole.plan.digest != data[0].plan.digest
    assert {len(list(one.eval.loader)) for one in data} == {2 // world_size}  # of at most 2 samples each


def test_at_most_max_samples_are_evaluated_and_the_rest_is_not_trained_on(world, monkeypatch):
    every = _ids(_data(_config(world, {"steps": 2, "holdout_samples": 5}), monkeypatch).eval.loader)
    some = _data(_config(world, {"steps": 2, "holdout_samples": 5, "max_samples": 2}), monkeypatch)
    assert len(every) == 5 and some.plan.num_samples == 6
    assert len(_ids(some.eval.loader)) == 2 and _ids(some.eval.loader) <= every


def test_an_evaluation_that_cannot_be_is_refused_before_training(world, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="eval.path=none.json: no such file"):
        check_inputs(_config(world, {"steps": 1, "path": "none.json"}))
    write_data(tmp_path / "bad", 3)
    (tmp_path / "bad" / "0.png").unlink()
    bad = {"steps": 1, "path": str(tmp_path / "bad" / "train.json")}
    with pytest.raises(DataError, match="1 of 3 records are bad: {'image file is missing': 1}"):
        _data(_config(world, bad), monkeypatch)
    skipping = _data(_config(world, bad, data__on_bad_sample="skip"), monkeypatch)
    assert _ids(skipping.eval.loader) == Counter(["s1", "s2"])
    for number in (1, 2):
        (tmp_path / "bad" / f"{number}.png").unlink()
    with pytest.raises(DataError, match="has no good sample; skipped: {'image file is missing': 3}"):
        _data(_config(world, bad, data__on_bad_sample="skip"), monkeypatch)
    records = json.loads((world / "held" / "train.json").read_text())
    for record in records:
        record["conversations"][1]["value"] = "a red fox " * 20
    (tmp_path / "bad" / "long.json").write_text(json.dumps(records[3:4]))  # without a picture
    with pytest.raises(ConfigError, match="train.micro_batch_tokens=60, but a sample has"):
        _data(_config(world, {"steps": 1, "path": str(tmp_path / "bad" / "long.json")},
                      train__micro_batch_tokens=60), monkeypatch)


def test_pictures_of_an_evaluation_are_in_the_feature_cache(world, tmp_path, monkeypatch):
    config = _config(world, _own(world), data__feature_cache=str(tmp_path))
    data = _data(config, monkeypatch, compute=lambda pixels: pixels.float().mean((1, 2, 3))[:, None, None].expand(
        -1, *SHAPE))
    batches = list(data.eval.loader)
    assert sum(len(batch.patch_features) for batch in batches) == 6  # of 7 samples one has no picture
    assert all(batch.pixel_values is None for batch in batches)
    assert all(batch.patch_features.std() > 0 for batch in batches if len(batch.patch_features) > 1)


def test_answers_are_runs_of_rows():
    assert number_answers(torch.tensor([3, 4, 5, 9, 10, 20])).tolist() == [0, 0, 0, 1, 1, 2]
    assert number_answers(torch.tensor([0])).tolist() == [0]


def _samples(data):
    plan, dataset = data.eval.plan, data.eval.loader.loader.dataset.dataset
    for slot in (slot for step in plan.steps for slot in step.slots):
        example = dataset[slot]
        yield example.encoded, torch.stack([*example.images]) if example.images else torch.zeros(0)


@pytest.fixture(scope="module")
def model(world):
    """A model that knows the first answer word for word, and a part of the others."""
    config = _config(world, _own(world))
    model = build_model(config.model, "sdpa", torch.float32, 0)
    optimizer = torch.optim.Adam(model.llm.parameters(), 3e-3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        batches = list(_data(config, monkeypatch, "padded").eval.loader)
    for _ in range(12):
        for batch in batches:
            (model(batch) / batch.num_supervised).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 4])
def test_scores_are_those_of_one_sample_at_a_time(world, model, monkeypatch, packing, micro_batch_size, world_size):
    config = _config(world, _own(world), train__micro_batch_size=min(micro_batch_size, 4 // world_size))
    data = [_data(config, monkeypatch, packing, Ranks(rank, rank, world_size)) for rank in range(world_size)]
    with torch.no_grad():
        sums = sum(score_batch(model, batch, CPU) for one in data for batch in one.eval.loader)
    loss, right, whole, answers, tokens = sums.tolist()
    expected = evaluate_reference(model, _samples(data[0]))
    assert (expected["eval_num_samples"], answers, tokens) == (7, 9, data[0].eval.plan.num_supervised)
    assert loss / tokens == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert right / tokens == expected["eval_token_accuracy"]
    assert whole / answers == expected["eval_teacher_forced_exact"]
    assert 0 < whole < answers and whole / answers < right / tokens < 1  # the measures can be told apart here


def test_a_batch_without_answers_counts_for_nothing(world, model, monkeypatch):
    data = _data(_config(world, _own(world, max_samples=1)), monkeypatch, ranks=Ranks(1, 1, 2))
    (batch,) = list(data.eval.loader)
    assert batch.sample_ids == ()
    assert score_batch(model, batch, CPU).tolist() == [0.0] * 5
