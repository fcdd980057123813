"""Batches of like size: nothing lost, nothing repeated, the same for every world size, and little padded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.data.bucket import Bucketed
from vlp.data.plan import PADDING, Plan

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def sizes(ids: np.ndarray) -> np.ndarray:
    """A size for every id, in no order."""
    return ids * 7919 % 101


def build(counts=(40, 25, 33), *, lanes=4, batch=8, block=5, seed=3) -> Bucketed:
    plan = Plan(np.array(counts), seed=seed, num_lanes=lanes, window_shards=2, global_batch=batch)
    return Bucketed(plan, sizes=sizes, block_steps=block, seed=seed)


@st.composite
def bucketed(draw) -> Bucketed:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6]))
    batch = lanes * draw(st.integers(1, 3))
    counts = [*draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)), batch]
    return build(counts, lanes=lanes, batch=batch, block=draw(st.integers(1, 9)), seed=draw(st.integers(0, 99)))


def epoch_of(order: Bucketed, epoch: int = 0, world: int = 1) -> np.ndarray:
    """The global batches [steps, B], put together from the slots of `world` ranks."""
    whole = np.full((order.num_steps, order.global_batch), -7)
    for rank in range(world):
        for step in range(order.num_steps):
            whole[step, rank::world] = order.rank_slots(epoch, step, rank, world)
    return whole


@FAST
@given(bucketed(), st.integers(0, 3))
def test_epoch_holds_every_sample_once_and_padding_in_its_last_step_only(order, epoch):
    ids = epoch_of(order, epoch)
    assert sorted(ids[ids != PADDING]) == list(range(order.plan.num_samples))
    assert (ids[:-1] != PADDING).all()


@FAST
@given(bucketed())
def test_every_world_size_reads_the_same_batches_from_its_own_lanes(order):
    whole = epoch_of(order)
    for world in [w for w in range(2, order.num_lanes + 1) if order.num_lanes % w == 0]:
        np.testing.assert_array_equal(epoch_of(order, world=world), whole)
    planned = np.stack([order.plan.step(0, step) for step in range(order.num_steps)])
    for lane in range(order.num_lanes):
        columns = slice(lane, None, order.num_lanes)
        assert set(whole[:, columns].flat) == set(planned[:, columns].flat)


def test_samples_stay_in_their_block():
    order = build()
    planned, dealt = np.stack([order.plan.step(0, step) for step in range(order.num_steps)]), epoch_of(order)
    for first in range(0, order.num_steps, order.block_steps):
        rows = slice(first, first + order.block_steps)
        assert sorted(planned[rows].flat) == sorted(dealt[rows].flat)


def test_steps_do_not_depend_on_what_was_asked_before():
    steps = [(epoch, step) for epoch in (0, 1) for step in range(build().num_steps)]
    order = build()
    backwards = [order.rank_slots(*at, 1, 2) for at in reversed(steps)][::-1]
    np.testing.assert_array_equal(np.stack(backwards), np.stack([build().rank_slots(*at, 1, 2) for at in steps]))


def test_batches_hold_like_sizes_and_come_in_no_order_of_size():
    order = build([4000], lanes=4, batch=8, block=100)
    ids = epoch_of(order)[:500]
    spread = np.ptp(sizes(ids), axis=1).mean()
    planned = np.stack([order.plan.step(0, step) for step in range(500)])
    assert spread < 0.1 * np.ptp(sizes(planned), axis=1).mean()
    means = sizes(ids).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_epochs_deal_differently():
    assert (epoch_of(build(), 0) != epoch_of(build(), 1)).mean() > 0.7


def test_upcoming_shards_hold_all_that_a_step_reads():
    order = build([9, 8, 10, 9, 11, 8], lanes=2, batch=4, block=4)
    for step in range(order.num_steps):
        ids = order.rank_slots(0, step, 1, 2)
        read = np.searchsorted(order.plan.offsets, ids[ids != PADDING], side="right") - 1
        assert set(read) <= set(order.upcoming(0, step, 1, 2))


def test_a_block_of_no_step_is_refused():
    with pytest.raises(ValueError, match="block_steps=0"):
        build(block=0)
