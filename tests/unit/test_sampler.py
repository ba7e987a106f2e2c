"""Every sample exactly as often as its weight says, in one global order, for every split, stop and resume."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from llava_ds.data.order import Items, Part, epoch_order, epoch_size, group_by_length, permutation
from llava_ds.data.packing import BatchSizes, computed_tokens
from llava_ds.data.sampler import DataState, Slot, plan_run, steps_per_epoch
from llava_ds.errors import ConfigError, DataError


class TableLengths:
    """Lengths that depend on the pass, as placement makes them."""

    def __init__(self, tokens, images):
        self.table, self.image_table = np.array(tokens), np.array(images)

    def tokens(self, indices, passes):
        return self.table[indices] + passes % 3

    def images(self, indices):
        return self.image_table[indices]


def _lengths(num_samples, seed=0):
    rng = np.random.default_rng(seed)
    return TableLengths(rng.integers(1, 60, num_samples), rng.integers(0, 2, num_samples))


def _plans(batch, num_steps=6, num_samples=23, **options):
    return list(plan_run([Part(np.arange(num_samples))], _lengths(num_samples), 3, batch, num_steps, **options))


def _random_mixture(rng):
    num_samples = int(rng.choice([rng.integers(1, 12), rng.integers(1, 60), rng.integers(1, 301)]))
    cuts = np.sort(rng.integers(0, num_samples + 1, rng.integers(0, 3)))
    numbers = np.split(rng.permutation(num_samples), cuts)  # a part may be empty
    weights = rng.choice([1.0, 1.0, 0.5, 2.0, 0.3, 1.7, 0.01], len(numbers))
    return num_samples, [Part(one, float(weight)) for one, weight in zip(numbers, weights, strict=True)]


def _random_batch(rng, global_batch_size):
    packing = str(rng.choice(["packed", "padded"]))
    budget = None if rng.random() < 0.5 else int(rng.integers(62, 400))  # the longest sample has 61 tokens
    return BatchSizes(global_batch_size, int(rng.integers(1, 9)), int(rng.integers(1, 10)), packing, budget)


def _check_shares(plan, batch, lengths):
    flat = [slot for row in plan.micro_batches for share in row for slot in share]
    assert Counter(flat) == Counter(plan.slots)
    shares = [share for row in plan.micro_batches for share in row]
    assert all(len(row) == batch.world_size for row in plan.micro_batches)
    assert len(plan.micro_batches) >= batch.num_micro_steps(len(plan.slots))
    assert all(len(share) <= batch.micro_batch_size for share in shares)
    assert sum(bool(share) for share in shares) == min(len(shares), len(flat))
    for share in shares if batch.max_tokens else ():
        tokens = lengths.tokens(np.array([s.index for s in share], int), np.array([s.epoch for s in share], int))
        assert computed_tokens(tokens, batch.packing) <= batch.max_tokens


def _check_multiplicity(slots, parts, num_epochs):
    """The first passes of each part whole, the last one begun, nothing twice."""
    assert len(set(slots)) == len(slots)
    for part in parts:
        members = set(part.indices.tolist())
        visits = Counter(slot.epoch for slot in slots if slot.index in members)
        taken = int(num_epochs * Fraction(str(part.weight)) * len(members))
        whole, begun = divmod(taken, len(members)) if members else (0, 0)
        assert visits == Counter({visit: len(members) for visit in range(whole)}) + Counter({whole: begun})


@pytest.mark.parametrize("num_cases", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_runs_stop_anywhere_and_go_on_at_another_world_size(num_cases):
    rng = np.random.default_rng(0)
    num_resumed = num_steps_seen = 0
    for case in range(num_cases):
        num_samples, parts = _random_mixture(rng)
        lengths, seed = _lengths(num_samples, case), int(rng.integers(1000))
        size, groups = int(rng.integers(1, 41)), int(rng.choice([1, 1, 2, 5]))
        first, second = _random_batch(rng, size), _random_batch(rng, size)
        num_epochs = int(rng.integers(1, 4))
        per_epoch = [epoch_size(parts, epoch) for epoch in range(num_epochs)]
        num_steps = sum(steps_per_epoch(one, size) for one in per_epoch)
        whole = list(plan_run(parts, lengths, seed, first, num_steps, length_groups=groups))
        assert len(whole) == num_steps
        slots = [slot for plan in whole for slot in plan.slots]
        assert len(slots) == sum(per_epoch)
        _check_multiplicity(slots, parts, num_epochs)
        # Every step is whole, except the last of each epoch.
        expected = [min(size, one - start) for one in per_epoch for start in range(0, one, size)]
        assert [len(plan.slots) for plan in whole] == expected
        for plan in whole[:6]:
            _check_shares(plan, first, lengths)
        num_steps_seen += num_steps

        stop = int(rng.integers(0, num_steps + 1))
        start = whole[stop - 1].state_after if stop else DataState()
        rest = list(plan_run(parts, lengths, seed, second, num_steps - stop, start, groups))
        assert [plan.slots for plan in rest] == [plan.slots for plan in whole[stop:]]
        assert [plan.state_after for plan in rest] == [plan.state_after for plan in whole[stop:]]
        for plan in rest[:6]:
            _check_shares(plan, second, lengths)
        num_resumed += bool(rest)
    assert num_resumed > num_cases / 2 and num_steps_seen > 9 * num_cases


def test_a_plan_is_the_same_when_made_again():
    batch = BatchSizes(8, 2, 2, max_tokens=100)
    assert _plans(batch) == _plans(batch)
    assert len(_plans(batch)) == 6


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 4), (4, 2), (2, 1), (1, 1), (8, 1), (3, 2)])
def test_the_steps_do_not_depend_on_the_split(world_size, micro):
    batch = BatchSizes(8, micro, world_size)
    split = _plans(batch)
    assert [plan.slots for plan in split] == [plan.slots for plan in _plans(BatchSizes(8, 8, 1))]
    assert len(split[0].micro_batches) == batch.grad_accum_steps == -(-8 // (world_size * micro))


def test_an_epoch_holds_every_sample_once_and_epochs_differ():
    plans = _plans(BatchSizes(8, 2, 2))
    epochs = [[slot for plan in three for slot in plan.slots] for three in (plans[:3], plans[3:])]
    for number, slots in enumerate(epochs):
        assert sorted(slots) == [Slot(number, index) for index in range(23)]
    assert [slot.index for slot in epochs[0]] != [slot.index for slot in epochs[1]]
    assert [plan.state_after for plan in plans] == [
        DataState(0, 8), DataState(0, 16), DataState(1, 0), DataState(1, 8), DataState(1, 16), DataState(2, 0)
    ]  # fmt: skip


def test_another_global_batch_size_goes_on_in_the_same_order():
    after_one = _plans(BatchSizes(8, 2, 2))[0].state_after
    rest = _plans(BatchSizes(5, 5, 1), 3, start=after_one)
    order = epoch_order([Part(np.arange(23))], 3, 0).indices.tolist()
    assert [slot.index for plan in rest for slot in plan.slots] == order[8:]


def test_a_state_at_the_end_of_an_epoch_goes_on_in_the_next():
    (plan,) = _plans(BatchSizes(8, 8, 1), 1, start=DataState(0, 23))
    assert plan == _plans(BatchSizes(8, 8, 1), 1, start=DataState(1, 0))[0]


def test_without_a_number_the_plans_never_end():
    endless = plan_run([Part(np.arange(3))], _lengths(3), 0, BatchSizes(2, 2, 1))
    assert [len(plan.slots) for plan in itertools.islice(endless, 5)] == [2, 1, 2, 1, 2]


def test_parts_with_weights_visit_as_often_as_they_say():
    parts = [Part(np.arange(10), 0.3), Part(np.arange(10, 14), 2.0), Part(np.arange(14, 17), 0.5)]
    epochs = [epoch_order(parts, 1, epoch) for epoch in range(10)]
    assert [len(one) for one in epochs] == [epoch_size(parts, epoch) for epoch in range(10)] == [12, 13] * 5
    visits = Counter(zip(np.concatenate([e.passes for e in epochs]).tolist(),
                         np.concatenate([e.indices for e in epochs]).tolist(), strict=True))
    assert set(visits.values()) == {1}
    expected = [(visit, index) for index in range(17) for visit in range(3 if index < 10 else 20 if index < 14 else 5)]
    assert set(visits) == set(expected)
    assert Counter(epochs[0].indices.tolist())[10] == 2  # both visits of an epoch, told apart by their pass


def test_every_pass_and_every_epoch_has_an_order_of_its_own():
    half = [epoch_order([Part(np.arange(40), 0.5)], 1, epoch) for epoch in range(4)]
    assert set(half[0].indices) | set(half[1].indices) == set(range(40))
    assert set(half[0].indices) != set(half[2].indices)  # another pass, other halves
    mixed = [epoch_order([Part(np.arange(40)), Part(np.arange(40, 80))], 1, epoch) for epoch in range(2)]
    assert (mixed[0].indices < 40).tolist() != (mixed[1].indices < 40).tolist()  # parts mix anew
    other_seed = epoch_order([Part(np.arange(40))], 2, 0)
    assert other_seed.indices.tolist() != epoch_order([Part(np.arange(40))], 1, 0).indices.tolist()


@pytest.mark.parametrize("weight", [0.1, 0.3, 1 / 3, 0.7, 1.1, 2.9, 1e-3, 12345.678])
def test_no_float_is_off_after_thousands_of_epochs(weight):
    part = Part(np.arange(30_000), weight)
    sizes = [epoch_size([part], epoch) for epoch in range(5000)]
    assert sum(sizes) == int(5000 * 30_000 * Fraction(str(weight)))
    assert max(sizes) - min(sizes) <= 1


def test_a_permutation_stays_the_same_under_every_numpy():
    assert permutation(10, 3, 1, 4).tolist() == [2, 5, 8, 3, 4, 9, 7, 6, 0, 1]
    assert sorted(permutation(1000, 0, 0).tolist()) == list(range(1000))
    assert permutation(1000, 0, 0).tolist() != permutation(1000, 0, 1).tolist()


def test_batches_of_a_group_hold_neighbours_by_length():
    items = Items(np.arange(100, 123), np.zeros(23, np.int64))
    tokens = np.arange(23) * 7 % 23
    grouped = group_by_length(items, tokens, 2, 5, (0, 0))
    batches = [grouped.indices[start : start + 5].tolist() for start in range(0, 23, 5)]
    assert batches[-1] == [120, 121, 122]  # what fills no batch keeps its place
    for group in (range(100, 110), range(110, 120)):  # 2 batches of 5 each
        by_length = sorted(group, key=lambda index: tokens[index - 100])
        assert by_length[:5] in batches and by_length[5:] in batches
    orders = {tuple(group_by_length(items, tokens, 2, 5, (0, epoch)).indices) for epoch in range(8)}
    assert len(orders) > 4  # the batches change places from epoch to epoch


def test_a_bad_weight_is_an_error():
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"{weight}"):
            Part(np.arange(3), weight)


def test_nothing_to_plan_is_an_error():
    with pytest.raises(DataError, match="no samples"):
        next(plan_run([Part(np.arange(0))], _lengths(1), 0, BatchSizes(2, 2, 1)))


def test_a_start_that_does_not_fit_the_data_is_an_error():
    with pytest.raises(DataError, match="24 samples of epoch 0 .* only 23"):
        _plans(BatchSizes(8, 8, 1), 1, start=DataState(0, 24))
    with pytest.raises(ConfigError, match="8 samples of epoch 0 .*\n?.*global_batch_size=5"):
        _plans(BatchSizes(5, 5, 1), 1, start=DataState(0, 8), length_groups=2)
