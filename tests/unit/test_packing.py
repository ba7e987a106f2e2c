"""A step shared among ranks: nothing lost, caps and budgets held, tokens and images balanced."""

from collections import Counter

import numpy as np
import pytest

from llava_ds.data.packing import BatchSizes, computed_tokens, cut_padded, fill_packed, share_step
from llava_ds.errors import ConfigError

NUM_CASES = 1500


def _sums(rows, values):
    return np.array([[values[share].sum() for share in row] for row in rows])


def _llava_like(rng, num_samples):
    images = (rng.random(num_samples) < 0.94).astype(np.int64)
    text = np.exp(rng.normal(np.where(images == 1, 5.06, 6.85), np.where(images == 1, 0.48, 0.75)))
    return np.clip(text.astype(np.int64) + 575 * images, 60, 2048), images


def test_random_steps():
    rng = np.random.default_rng(0)
    num_balanced = num_budgets = num_relaxed = 0
    for _ in range(NUM_CASES):
        num_samples = int(rng.integers(1, 80))
        tokens = rng.integers(1, rng.choice([3, 50, 2000]), num_samples)
        images = rng.integers(0, rng.choice([1, 2, 2, 4]) + 1, num_samples)
        budget = int(tokens.max() * rng.integers(1, 5)) if rng.random() < 0.5 else None
        packing = str(rng.choice(["packed", "padded"]))
        batch = BatchSizes(num_samples, int(rng.integers(1, 20)), int(rng.integers(1, 10)), packing, budget)
        rows = share_step(tokens, images, batch)
        shares = [share for row in rows for share in row]
        assert Counter(np.concatenate(shares).tolist()) == Counter(range(num_samples))
        assert all(len(row) == batch.world_size for row in rows) and len(rows) >= batch.grad_accum_steps
        assert all(len(share) <= batch.micro_batch_size for share in shares)
        assert sum(len(share) > 0 for share in shares) == min(len(shares), num_samples)
        if budget:
            assert max(computed_tokens(tokens[share], packing) for share in shares) <= budget
            num_budgets += 1
        else:
            assert len(rows) == batch.grad_accum_steps
        if packing == "packed" and images.max() <= 1:
            spread = np.ptp(_sums(rows, images))
            assert spread <= 1 or budget
            num_balanced += 0 < images.sum() and not budget
            num_relaxed += spread > 1
    assert min(num_balanced, num_budgets) > 100 and num_relaxed > 3


def test_rank_loads_are_within_a_hundredth_on_data_like_llavas():
    rng = np.random.default_rng(1)
    useful = waited = 0
    for _ in range(50):
        tokens, images = _llava_like(rng, 128)
        rows = share_step(tokens, images, BatchSizes(128, 16, 8))
        loads = _sums(rows, tokens)
        assert loads.shape == (1, 8) and np.ptp(_sums(rows, images)) <= 1
        useful, waited = useful + loads.sum(), waited + 8 * loads.max()
    assert 0 < 1 - useful / waited < 0.005


def test_a_swap_finds_what_dealing_the_longest_first_misses():
    bins = fill_packed(np.array([5, 4, 3, 3, 3]), np.zeros(5, int), 2, 5)
    assert sorted(sorted(one.tolist()) for one in bins) == [[0, 1], [2, 3, 4]]  # 9 and 9; dealing gives 8 and 10


def test_images_are_shared_evenly_even_where_tokens_pull_the_other_way():
    tokens, images = np.array([100, 10, 10, 10, 10, 10, 10, 10]), np.array([0, 1, 1, 1, 1, 1, 1, 0])
    bins = fill_packed(tokens, images, 2, 4)
    assert sorted(images[one].sum() for one in bins) == [3, 3]
    assert sorted(len(one) for one in bins) == [4, 4]


def test_samples_of_several_images_are_leveled():
    images = np.array([5, 1, 5, 1, 1, 1, 1, 1])
    bins = fill_packed(np.full(8, 100), images, 2, 4)  # all equally long: tokens say nothing
    assert [images[one].sum() for one in bins] == [8, 8]


def test_the_budget_comes_before_even_images():
    tokens, images = np.array([90, 40, 40, 40, 40, 40]), np.array([0, 1, 1, 1, 1, 1])
    (row,) = share_step(tokens, images, BatchSizes(6, 4, 2, max_tokens=165))
    assert sorted(images[share].sum() for share in row) == [1, 4]  # 130 and 160; even images would make it 170
    (row,) = share_step(tokens, images, BatchSizes(6, 4, 2, max_tokens=170))
    assert sorted(images[share].sum() for share in row) == [2, 3]


def test_the_number_of_micro_steps_follows_from_the_budget():
    tokens, images = np.full(12, 100), np.ones(12, int)
    for budget, num_steps in ((None, 1), (600, 1), (599, 2), (300, 2), (299, 3), (199, 6), (100, 6)):
        assert len(share_step(tokens, images, BatchSizes(12, 6, 2, max_tokens=budget))) == num_steps
        assert len(share_step(tokens, images, BatchSizes(12, 6, 2, "padded", budget))) == num_steps


def test_a_sample_longer_than_the_budget_is_an_error_that_names_both():
    for packing in ("packed", "padded"):
        with pytest.raises(ConfigError, match="has 31 tokens.*max_tokens=30"):
            share_step(np.array([3, 31]), np.array([0, 0]), BatchSizes(2, 2, 1, packing, 30))


def test_micro_batches_of_about_equal_cost_meet_in_a_micro_step():
    tokens = np.array([9, 1, 8, 2, 7, 3])
    rows = share_step(tokens, np.zeros(6, int), BatchSizes(6, 1, 2))
    assert _sums(rows, tokens).tolist() == [[9, 8], [3, 7], [2, 1]]  # every second one backwards
    padded = share_step(np.array([9, 9, 5, 5, 8, 8, 4, 4]), np.zeros(8, int), BatchSizes(8, 2, 2, "padded"))
    assert [[share.tolist() for share in row] for row in padded] == [[[0, 1], [4, 5]], [[6, 7], [2, 3]]]


def test_padded_bins_cost_as_little_as_a_search_over_all_cuts_finds():
    rng = np.random.default_rng(2)
    for _ in range(60):
        tokens, num_bins = rng.integers(1, 30, 7), int(rng.integers(1, 5))
        falling = -np.sort(-tokens)
        masks = [[cut for cut in range(1, 7) if mask >> (cut - 1) & 1] for mask in range(64)]
        best = min(
            max(len(one) * one.max() for one in np.split(falling, cuts)) for cuts in masks if len(cuts) == num_bins - 1
        )
        assert max(computed_tokens(tokens[one], "padded") for one in cut_padded(tokens, num_bins, 7)) == best


def test_more_micro_batches_than_samples_leave_some_empty():
    for packing in ("packed", "padded"):
        rows = share_step(np.array([5, 9]), np.array([1, 0]), BatchSizes(8, 2, 4, packing))
        assert sorted(len(share) for share in rows[0]) == [0, 0, 1, 1]


def test_sizes_below_one_are_an_error():
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ConfigError, match="is 0"):
            BatchSizes(*sizes)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        BatchSizes(1, 1, 1, max_tokens=0)
