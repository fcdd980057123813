import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.data.mix import Schedule

FAST = settings(max_examples=40, deadline=None, derandomize=True)
WEIGHTS = st.lists(st.floats(0, 10).filter(lambda w: w == 0 or w > 1e-3), min_size=1, max_size=6).filter(any)


@FAST
@given(WEIGHTS, st.integers(0, 99))
def test_cursor_equals_counting_by_hand(weights, seed):
    schedule, seen = Schedule(weights, seed=seed), [0] * len(weights)
    for step in range(200):
        source, cursor = schedule.turn(step)
        assert cursor == seen[source]
        seen[source] += 1


@FAST
@given(WEIGHTS, st.integers(0, 99), st.integers(0, 10**9))
def test_counts_follow_the_weights_to_within_the_position(weights, seed, step):
    counts = Schedule(weights, seed=seed).counts(step)
    assert sum(counts) == step
    for position, (weight, count) in enumerate(zip(weights, counts, strict=False)):
        assert abs(count - weight / sum(weights) * step) <= position + 1 + step / 2**32


@FAST
@given(WEIGHTS, st.integers(10**7, 10**12))
def test_late_steps_are_consistent(weights, step):
    schedule = Schedule(weights, seed=0)
    before, after = schedule.counts(step), schedule.counts(step + 1)
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(before) - 1) + [1]
    assert schedule.turn(step).cursor in before


def test_source_of_weight_zero_is_never_drawn():
    sources = {Schedule([0.0, 3.0, 0.0, 1.0, 0.0], seed=2).turn(step).source for step in range(50)}
    assert sources == {1, 3}


def test_seed_changes_the_deal_and_the_same_seed_repeats_it():
    def deal(seed):
        return [Schedule([5.0, 3.0, 2.0], seed=seed).turn(step).source for step in range(40)]

    assert deal(1) == deal(1) != deal(2)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.5], [float("nan")], [float("inf"), 1.0]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="must be finite, not negative, and at least one positive"):
        Schedule(weights, seed=0)
