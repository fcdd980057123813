"""A small share of tests/plan_draws.py, with a seed of its own, and proof that its oracle sees what it looks for."""

import numpy as np
import plan_draws
import pytest
from plan_draws import Count

from vlp.data.plan import PADDING, Plan


def test_histories_lose_repeat_and_change_nothing():
    total = plan_draws.run(draws=30_000, seed=4, budget=6_000)
    assert total._replace(draws=0) == Count(total.histories, total.attempts) and total.attempts > total.histories


@pytest.mark.parametrize(("field", "change"), [("lost", 3), ("repeated", 3), ("misplaced", PADDING)])
def test_the_oracle_sees_what_is_wrong(field, change):
    plan = Plan(np.array([5, 9]), seed=0, num_lanes=2, window_shards=1, global_batch=4)
    steps = [plan.step(0, step) for step in range(plan.num_steps)]
    assert plan_draws._epoch_verdict(steps, plan) == Count(draws=14)
    steps[0][0] = change if steps[0][0] != change else change + 1
    assert getattr(plan_draws._epoch_verdict(steps, plan), field) == 1


def test_a_rank_that_reads_other_samples_is_seen(monkeypatch):
    slots = plan_draws._slots
    monkeypatch.setattr(plan_draws, "_slots", lambda *a: slots(*a)[::-1] if a[4] > 1 else slots(*a))
    assert plan_draws.run(draws=6_000, seed=4, budget=3_000).changed > 0
