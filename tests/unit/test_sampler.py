"""Global batches are the same for every split over ranks and accumulation, and nothing is left out."""

import pytest

from llava_ds.data.sampler import BatchSizes, plan_run

LENGTHS = [7 + (13 * number) % 41 for number in range(23)]


def _plans(world_size: int, micro: int, steps: int = 6):
    return list(plan_run(LENGTHS, seed=3, num_steps=steps, batch=BatchSizes(8, micro, world_size)))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 4), (4, 2), (2, 1), (1, 1), (8, 1)])
def test_the_global_batches_do_not_depend_on_the_split(world_size, micro):
    reference = [sorted((s.epoch, s.index) for s in plan.slots) for plan in _plans(1, 8)]
    split = _plans(world_size, micro)
    assert [sorted((s.epoch, s.index) for s in plan.slots) for plan in split] == reference
    assert all(len(plan.micro_batches) == 8 // (world_size * micro) for plan in split)
    assert all(len(row) == world_size for plan in split for row in plan.micro_batches)
    assert all(len(share) <= micro for plan in split for row in plan.micro_batches for share in row)


def test_an_epoch_holds_every_sample_once():
    first_epoch = _plans(2, 2)[:3]  # ceil(23 / 8) steps
    assert sorted(slot.index for plan in first_epoch for slot in plan.slots) == list(range(23))
    assert {slot.epoch for plan in first_epoch for slot in plan.slots} == {0}
    second_epoch = _plans(2, 2)[3:]
    assert sorted(slot.index for plan in second_epoch for slot in plan.slots) == list(range(23))
    assert [p.slots for p in first_epoch] != [p.slots for p in second_epoch]


def test_micro_batches_hold_about_as_many_tokens():
    plan = _plans(4, 2)[0]
    sums = [sum(LENGTHS[s.index] for s in share) for row in plan.micro_batches for share in row]
    assert max(sums) - min(sums) < max(LENGTHS)
