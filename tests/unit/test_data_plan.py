"""From sources to the batches of every rank: the same samples, ids and order for any workers, ranks and stops."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_ds.config import RunConfig, load_recipe
from llava_ds.constants import IGNORE_INDEX
from llava_ds.data import build
from llava_ds.data.build import build_training_data, plan_data
from llava_ds.data.images import ImageTransform
from llava_ds.data.text_pipeline import TextPipeline
from llava_ds.distributed import Ranks
from llava_ds.engine.agree import check_planned, too_many_bad
from llava_ds.errors import ConfigError, DataError
from llava_ds.models.build import load_tokenizer
from tests.helpers.tiny import IMAGE_SIZE, write_data, write_llm, write_recipe

TRANSFORM = ImageTransform(IMAGE_SIZE, (0.5,) * 3, (0.5,) * 3, "square", "bicubic")
SHAPE = (9, 32)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    write_llm(root / "llm")
    write_data(root / "data", 23)
    return root


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(str(world / "llm"))


def _config(world: Path, **changes) -> RunConfig:
    settings = {"train__epochs": 3, "train__max_steps": 999, "train__micro_batch_size": 1}
    return load_recipe(str(write_recipe(world, train__global_batch_size=6, **settings | changes)))


def _data(config: RunConfig, tokenizer, ranks: Ranks, monkeypatch):
    # Other ranks are not there to wait for.
    monkeypatch.setattr(build, "run_on_main_first", lambda _, work: work())
    monkeypatch.setattr(build, "check_agreement", lambda *_: None)
    return build_training_data(config, "packed", tokenizer, TRANSFORM, SHAPE, "key", lambda _: None, ranks)


def _samples(batch) -> list[tuple]:
    """(id, ids, supervised ids) of each sample of a packed batch."""
    bounds = batch.cu_seqlens.tolist()
    rows = batch.input_ids[0]
    found = []
    for sample_id, begin, end in zip(batch.sample_ids, bounds, bounds[1:], strict=False):
        inside = (batch.loss_rows >= begin) & (batch.loss_rows < end)
        found.append((sample_id, tuple(rows[begin:end].tolist()), tuple(batch.loss_labels[inside].tolist())))
    return found


def _steps(world, tokenizer, monkeypatch, world_size: int, workers: int, micro: int = 1) -> list[list[tuple]]:
    """The samples of every step, over all ranks, sorted."""
    config = _config(world, data__num_workers=workers, train__micro_batch_size=micro)
    steps: list[list[tuple]] = []
    for rank in range(world_size):
        data = _data(config, tokenizer, Ranks(rank, rank, world_size), monkeypatch)
        stream = iter(data.loader)
        for number, plan in enumerate(data.plan.steps()):
            if rank == 0:
                steps.append([])
            for _ in plan.micro_batches:
                steps[number] += _samples(next(stream))
    return [sorted(step) for step in steps]


def test_every_world_size_and_number_of_workers_gives_the_same_ids_in_every_step(world, tokenizer, monkeypatch):
    reference = _steps(world, tokenizer, monkeypatch, 1, 0)
    assert [len(step) for step in reference] == [6, 6, 6, 5] * 3
    assert Counter(sample[0] for step in reference for sample in step) == {f"s{n}": 3 for n in range(23)}
    for world_size, workers, micro in ((1, 2, 2), (2, 0, 3), (3, 1, 1), (6, 0, 1)):
        assert _steps(world, tokenizer, monkeypatch, world_size, workers, micro) == reference, (world_size, workers)


def test_both_orders_are_there_and_change_with_the_epoch(world, tokenizer, monkeypatch):
    steps = _steps(world, tokenizer, monkeypatch, 1, 0)
    orders: dict[str, list[bool]] = {}
    for sample_id, ids, _ in (sample for step in steps for sample in step):
        if -200 in ids:
            orders.setdefault(sample_id, []).append(ids.index(-200) < 6)  # "Q: " or "Q: What is this?"
    flat = [order for found in orders.values() for order in found]
    assert len(flat) == 3 * 18
    assert 10 < sum(flat) < 44  # a fair coin: five standard deviations from 27 are 18
    assert any(len(set(found)) == 2 for found in orders.values())


def _plan(world, tokenizer, **changes):
    config = _config(world, **changes)
    settings = config.data
    text = TextPipeline(tokenizer, settings.template, settings.placement, 9, settings.max_length, config.seed,
                        settings.truncation)
    return plan_data(config, "packed", text, Ranks(0, 0, 1)), text


def test_planned_lengths_are_those_that_are_encoded(world, tokenizer):
    plan, text = _plan(world, tokenizer)
    num_compared = 0
    for step in plan.steps():
        indices, passes = (np.array([getattr(slot, name) for slot in step.slots]) for name in ("index", "epoch"))
        encoded = [text.encode(plan.source[slot.index], slot.epoch) for slot in step.slots]
        assert plan.lengths.tokens(indices, passes).tolist() == [len(e.input_ids) for e in encoded]
        assert plan.lengths.supervised(indices, passes).tolist() == [e.num_supervised for e in encoded]
        assert plan.supervised_tokens(step) == sum(e.num_supervised for e in encoded)
        num_compared += len(encoded)
    assert num_compared == 69


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7, 11, 12])
def test_a_stopped_run_goes_on_with_the_same_steps(world, tokenizer, stop):
    plan, _ = _plan(world, tokenizer)
    steps = list(plan.steps())
    assert len(steps) == 12
    state = steps[stop - 1].state_after if stop else None
    rest = list(plan.steps(state, num_done=stop) if state else plan.steps())
    assert [step.slots for step in rest] == [step.slots for step in steps[stop:]]


def test_a_mixture_visits_each_source_by_its_weight(world, tokenizer):
    small = json.loads((world / "data" / "train.json").read_text())[:4]
    (world / "data" / "small.json").write_text(json.dumps(small))
    mixture = [{"path": str(world / "data" / "train.json"), "weight": 0.5},
               {"path": str(world / "data" / "small.json"), "weight": 2}]
    plan, _ = _plan(world, tokenizer, data__path=None, data__mixture=mixture, train__epochs=2)
    counts = Counter(slot.index for step in plan.steps() for slot in step.slots)
    assert {counts[n] for n in range(23)} == {1}
    assert [counts[23 + n] for n in range(4)] == [4] * 4
    assert plan.num_samples == 27
    assert plan.source[24].origin == "small.json[1]"


def test_path_and_mixture_are_not_given_together(world):
    with pytest.raises(ConfigError, match="either data.path or data.mixture"):
        _config(world, data__mixture=[{"path": "x"}])
    with pytest.raises(ConfigError, match="data.image_root belongs to data.path"):
        _config(world, data__path=None, data__mixture=[{"path": "x"}], data__image_root="y")


def test_a_sample_beyond_the_token_budget_is_named_before_training(world, tokenizer):
    with pytest.raises(ConfigError, match=r"train.micro_batch_tokens=40, but a sample has 4\d tokens"):
        _plan(world, tokenizer, train__micro_batch_tokens=40)


def _with_long_record(world: Path) -> str:
    records = json.loads((world / "data" / "train.json").read_text())
    rounds = [{"from": "human", "value": "Where is the fox?"}, {"from": "gpt", "value": "on the left"}] * 9
    records += [{"id": "long", "conversations": rounds},
                {"id": "longer", "conversations": [{"from": "human", "value": "x " * 80}, rounds[1]]}]
    (world / "data" / "long.json").write_text(json.dumps(records))
    return str(world / "data" / "long.json")


@pytest.mark.parametrize(
    ("policy", "num_samples", "num_cut", "skipped"),
    [("drop_last_turns", 24, 1, {"longer than data.max_length": 1}), ("none", 25, 0, {}),
     ("drop_sample", 23, 0, {"longer than data.max_length": 2}),
     ("official", 24, 1, {"no supervised token is left": 1})],
)
def test_what_does_not_fit_is_counted(world, tokenizer, policy, num_samples, num_cut, skipped):
    plan, _ = _plan(world, tokenizer, data__path=_with_long_record(world), data__truncation=policy,
                    data__max_length=60)
    assert (plan.num_samples, plan.lengths.num_cut(), dict(plan.lengths.skipped())) == (num_samples, num_cut, skipped)


def test_the_policy_error_names_every_record_that_does_not_fit(world, tokenizer):
    with pytest.raises(DataError, match="(?s)2 of 25 records are bad.*id='long'.*id='longer'"):
        _plan(world, tokenizer, data__path=_with_long_record(world), data__truncation="error", data__max_length=60)


def test_a_bad_picture_is_an_error_with_the_records_name_or_trains_nothing(world, tokenizer, monkeypatch):
    data = world / "bad"
    write_data(data, 5)
    whole = (data / "0.png").read_bytes()
    (data / "0.png").write_bytes(whole[: len(whole) // 2])
    path = {"data__path": str(data / "train.json"), "train__epochs": 1}
    with pytest.raises(DataError, match=r"train.json\[0\] id='s0': image .*0.png does not decode"):
        for _ in _data(_config(world, **path), tokenizer, Ranks(0, 0, 1), monkeypatch).loader:
            pass
    skipping = _data(_config(world, **path, data__on_bad_sample="skip"), tokenizer, Ranks(0, 0, 1), monkeypatch)
    batches = {batch.sample_ids[0]: batch for batch in skipping.loader}
    assert sorted(batches) == [f"s{n}" for n in range(5)]
    bad, good = batches.pop("s0"), batches["s1"]
    assert len(bad.problems) == 1 and "does not decode" in bad.problems[0]
    assert bad.loss_labels.tolist() == [IGNORE_INDEX] and bad.num_supervised == 0
    assert torch.equal(bad.pixel_values, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8))
    assert not good.problems and good.num_supervised > 0


@pytest.mark.parametrize(
    ("bad", "seen", "frac", "stops"),
    [(0, 5, 0.0, False), (1, 5, 0.0, True), (10, 20, 0.01, False), (11, 20, 0.01, True), (11, 2000, 0.01, False),
     (21, 2000, 0.01, True), (20, 20, 1.0, False)],
)
def test_the_share_of_bad_pictures_is_bounded(bad, seen, frac, stops):
    assert too_many_bad(bad, seen, frac) == stops


@pytest.mark.parametrize("what", ["step", "evaluation"])
def test_data_that_changed_since_it_was_measured_are_told_what_to_delete(what):
    check_planned(what, 7, 7)
    with pytest.raises(DataError, match=f"the {what} was planned with 7 supervised tokens but has 6: .*\n.*'lengths'"):
        check_planned(what, 7, 6)
