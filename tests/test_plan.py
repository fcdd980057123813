import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.data import plan as module
from vlp.data.plan import PADDING, Plan, check_layout

FAST = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def plans(draw) -> Plan:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    global_batch = lanes * draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))
    counts.append(max(0, global_batch - sum(counts)))  # at least one batch
    window = draw(st.integers(1, 4))
    return Plan(
        np.array(counts),
        seed=draw(st.integers(0, 99)),
        num_lanes=lanes,
        window_shards=window,
        global_batch=global_batch,
    )


def epoch_of(plan: Plan, epoch: int = 0) -> np.ndarray:
    return np.stack([plan.step(epoch, step) for step in range(plan.num_steps)])


@FAST
@given(plans(), st.integers(0, 5))
def test_epoch_holds_every_sample_once(plan, epoch):
    ids = epoch_of(plan, epoch)
    assert sorted(ids[ids != PADDING]) == list(range(plan.num_samples))


@FAST
@given(plans())
def test_padding_appears_only_in_the_last_step(plan):
    ids = epoch_of(plan)
    assert (ids[:-1] != PADDING).all()
    assert (ids[-1] != PADDING).any()


@FAST
@given(plans(), st.integers(0, 5), st.data())
def test_ranks_share_the_global_batch_for_every_world_size(plan, epoch, data):
    step = data.draw(st.integers(0, plan.num_steps - 1))
    whole = plan.step(epoch, step)
    for world in [w for w in range(1, plan.num_lanes + 1) if plan.num_lanes % w == 0]:
        joined = np.full_like(whole, -7)
        for rank in range(world):
            joined[rank::world] = plan.rank_slots(epoch, step, rank, world)
        np.testing.assert_array_equal(joined, whole)


@FAST
@given(plans(), st.data())
def test_a_history_of_world_sizes_loses_and_repeats_nothing(plan, data):
    worlds = [w for w in range(1, plan.num_lanes + 1) if plan.num_lanes % w == 0]
    seen = []
    for step in range(plan.num_steps):
        world = data.draw(st.sampled_from(worlds))
        seen += [plan.rank_slots(3, step, rank, world) for rank in range(world)]
    ids = np.concatenate(seen)
    assert sorted(ids[ids != PADDING]) == list(range(plan.num_samples))


@FAST
@given(plans())
def test_steps_do_not_depend_on_what_was_asked_before(plan):
    fresh = Plan(
        plan.counts,
        seed=plan.seed,
        num_lanes=plan.num_lanes,
        window_shards=plan.window_shards,
        global_batch=plan.global_batch,
    )
    backwards = [plan.step(epoch, step) for epoch in (1, 0) for step in reversed(range(plan.num_steps))][::-1]
    np.testing.assert_array_equal(backwards, np.concatenate([epoch_of(fresh, 0), epoch_of(fresh, 1)]))


@FAST
@given(plans())
def test_lane_reads_at_most_one_window_of_shards_at_a_time(plan):
    length = -(-plan.num_samples // plan.num_lanes)
    lane = epoch_of(plan)[:, 0 :: plan.num_lanes].reshape(-1)[:length]  # lane 0 is the longest
    shard = np.searchsorted(plan.offsets, lane, side="right") - 1
    spans = [np.flatnonzero(shard == s)[[0, -1]] for s in np.unique(shard)]
    assert max(sum(first <= i <= last for first, last in spans) for i in range(length)) <= plan.window_shards


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 8}])
def test_epoch_and_seed_change_the_order(change):
    def order(epoch=0, seed=7):
        return epoch_of(Plan(np.array([13, 11, 17]), seed=seed, num_lanes=3, window_shards=2, global_batch=6), epoch)

    np.testing.assert_array_equal(order(), order())
    assert (order(**change) != order()).mean() > 0.7


def test_single_shard_is_shuffled_across_lanes():
    plan = Plan(np.array([1200]), seed=0, num_lanes=4, window_shards=1, global_batch=4)
    lane = epoch_of(plan)[:, 0]
    assert lane.min() < 50 and lane.max() > 1150  # not a fixed quarter of the shard


def test_order_is_pinned_by_version():
    plan = Plan(np.array([3, 5, 2]), seed=1, num_lanes=2, window_shards=2, global_batch=4)
    assert module.VERSION == 1
    assert epoch_of(plan).tolist() == [[6, 9, 2, 3], [1, 4, 0, 8], [7, 5, PADDING, PADDING]]


@pytest.mark.parametrize("size", [3, 4, 6])
def test_permutations_are_equally_frequent(size):
    num_keys = 200 * int(np.prod(np.arange(1, size + 1)))
    index, stream = np.tile(np.arange(size), num_keys), np.repeat(np.arange(num_keys), size)
    image = module._permuted(index, np.full(len(stream), size), stream, 5).reshape(-1, size)
    assert (np.sort(image, axis=1) == np.arange(size)).all()
    _, seen = np.unique(image @ size ** np.arange(size), return_counts=True)
    assert len(seen) * 200 == num_keys
    assert ((seen - 200) ** 2 / 200).sum() / (len(seen) - 1) < 2  # chi-square per degree of freedom


def test_large_plan_is_fast_and_small():
    began = time.perf_counter()
    plan = Plan(np.full(100_000, 1000), seed=1, num_lanes=512, window_shards=8, global_batch=4096)
    ids = plan.step(3, plan.num_steps - 2)
    assert time.perf_counter() - began < 1.0  # 5 ms on a quiet core
    assert len(np.unique(ids)) == 4096 and plan.num_samples == 100_000_000
    assert sum(a.nbytes for a in (plan.counts, plan.offsets, *plan._order(3))) < 4_000_000


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"global_batch": 10, "num_lanes": 4, "world_size": 1}, "set batch_size to 8 or num_lanes to a divisor of 10"),
        ({"global_batch": 12, "num_lanes": 12, "world_size": 5}, "use a world size of 1 or 2 or 3 or 4 or 6 or 12"),
        ({"global_batch": 12, "num_lanes": 6, "world_size": 4}, "use a world size of 1 or 2 or 3 or 6,"),
        ({"global_batch": 12, "num_lanes": 6, "world_size": 6, "accumulate": 4}, "use a world size of 1 or 3,"),
        ({"global_batch": 12, "num_lanes": 6, "world_size": 1, "accumulate": 5}, "accumulate to a divisor of 12"),
    ],
)
def test_layout_that_does_not_divide_is_refused_with_the_fix(layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(**layout)


def test_rank_of_a_world_that_does_not_divide_the_lanes_is_refused():
    plan = Plan(np.array([9]), seed=0, num_lanes=3, window_shards=1, global_batch=6)
    with pytest.raises(ValueError, match="world_size=2 does not fit num_lanes=3"):
        plan.rank_slots(0, 0, 0, 2)


def test_source_smaller_than_one_batch_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"'web' has 11 training samples in 2 shards.*batch_size=12.*batch_size to 8"):
        Plan(np.array([5, 6]), seed=0, num_lanes=4, window_shards=1, global_batch=12, name="web")
    with pytest.raises(ValueError, match="num_lanes and batch_size to at most 3"):
        Plan(np.array([1, 2]), seed=0, num_lanes=4, window_shards=1, global_batch=12)


def test_window_of_no_shard_is_refused():
    with pytest.raises(ValueError, match="window_shards=0 must be at least 1"):
        Plan(np.array([5]), seed=0, num_lanes=1, window_shards=0, global_batch=1)


@pytest.mark.parametrize(("lanes", "group", "world"), [(4, 3, 2), (1, 1, 1), (2, 50, 1), (3, 2, 3)])
def test_upcoming_shards_are_those_of_the_next_steps(lanes, group, world):
    plan = Plan(np.arange(5, 30), seed=4, num_lanes=lanes, window_shards=group, global_batch=lanes)
    shard_of = np.repeat(np.arange(25), np.arange(5, 30))
    order = [(epoch, step) for epoch in (0, 1) for step in range(plan.num_steps)]
    for at, (epoch, step) in enumerate(order[: plan.num_steps]):
        for rank in range(world):
            ids = [plan.rank_slots(*when, rank, world) for when in order[at : at + 5]]
            soon = {int(shard_of[i]) for i in np.concatenate(ids) if i != PADDING}
            wanted = plan.upcoming(epoch, step, rank, world)
            assert soon <= set(wanted) and len(set(wanted)) == len(wanted) <= 2 * group * (lanes // world)
            now = {int(shard_of[i]) for i in ids[0] if i != PADDING}
            assert now <= set(wanted[: group * (lanes // world)])
