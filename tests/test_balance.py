"""Clips dealt to ranks by size: nothing changes but who reads what, and nobody has much more than another."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.data.balance import Balanced
from vlp.data.plan import PADDING, Plan

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def sizes(ids: np.ndarray) -> np.ndarray:
    return ids * 7919 % 101


def build(*, lanes=6, batch=24, accumulate=2, counts=(40, 25, 33), of=sizes) -> Balanced:
    plan = Plan(np.array(counts), seed=3, num_lanes=lanes, window_shards=2, global_batch=batch)
    return Balanced(plan, sizes=of, accumulate=accumulate)


@FAST
@given(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.data())
def test_every_world_size_has_the_global_batch_and_the_micro_batches_of_one_process(world, accumulate, epoch, data):
    order = build(accumulate=accumulate)
    step = data.draw(st.integers(0, order.num_steps - 1))
    alone = order.rank_slots(epoch, step, 0, 1).reshape(accumulate, -1)
    ranks = [order.rank_slots(epoch, step, rank, world).reshape(accumulate, -1) for rank in range(world)]
    np.testing.assert_array_equal(np.sort(np.concatenate(ranks, axis=1)), np.sort(alone))
    assert sorted(alone.flat) == sorted(order.plan.rank_slots(epoch, step, 0, 1))


def test_micro_batches_hold_like_sizes_longest_first_and_masked_slots_count_as_longest():
    order = build()
    last = order.rank_slots(0, order.num_steps - 1, 0, 1).reshape(2, -1)
    num_masked = 24 * order.num_steps - 98
    assert (last[0] == PADDING).sum() == min(12, num_masked) > 0
    first = sizes(order.rank_slots(0, 0, 0, 1)).reshape(2, -1)
    assert first[0].min() >= first[1].max()


@pytest.mark.parametrize(("balanced", "low", "high"), [(True, 1.0, 1.1), (False, 1.5, 3.0)])
def test_the_slowest_of_64_ranks_is_near_the_mean(balanced, low, high):
    lengths = np.random.default_rng(0).lognormal(2.4, 0.65, 40_000).clip(3, 77)
    order = build(lanes=64, batch=512, accumulate=1, counts=[40_000], of=lambda ids: (lengths[ids] * 1e6).astype(int))
    chosen = order if balanced else order.plan
    work = [[lengths[chosen.rank_slots(0, step, rank, 64)].sum() for rank in range(64)] for step in range(5)]
    assert low <= np.mean(np.max(work, axis=1) / np.mean(work, axis=1)) <= high


def test_a_world_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="world_size=4 does not fit num_lanes=6"):
        build().rank_slots(0, 0, 0, 4)


def test_upcoming_shards_are_those_of_all_ranks():
    order = build(counts=[9, 8, 10, 9, 11, 8], lanes=2, batch=4, accumulate=1)
    for step in range(order.num_steps):
        ids = order.rank_slots(0, step, 1, 2)
        read = np.searchsorted(order.plan.offsets, ids[ids != PADDING], side="right") - 1
        assert set(read) <= set(order.upcoming(0, step, 1, 2))
