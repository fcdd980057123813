"""Progress at a rate of failures."""

import math

import pytest

from vlp.planning.goodput import Saving, best_interval_s, goodput, simulate

SYNC, ASYNC, FAST = Saving(60, 60, 600), Saving(2, 60, 120), Saving(0.5, 30, 60)
# Hours between failures -> percent with each way of saving, and for the last one at a fixed 30 minutes.
TABLE = {
    1: (70.3, 92.3, 96.0, 76.1),
    3: (85.3, 96.6, 98.3, 91.6),
    12: (94.0, 98.7, 99.4, 98.0),
    48: (97.4, 99.5, 99.8, 99.5),
}


@pytest.mark.parametrize("hours", TABLE)
def test_table_of_published_histories_is_reproduced(hours):
    """Other random histories of 10 days: a point and a half at most."""
    cases = [(SYNC, None), (ASYNC, None), (FAST, None), (FAST, 1800)]
    found = [100 * goodput(saving, 3600 * hours, interval_s=interval) for saving, interval in cases]
    assert found == pytest.approx(TABLE[hours], abs=1.5)


def test_interval_follows_the_formula_and_is_never_shorter_than_a_write():
    assert best_interval_s(SYNC, 3600) == pytest.approx(60 + math.sqrt(2 * 4200 * 60 + 3600))
    assert best_interval_s(Saving(0.01, 50, 0), 60) == 50


def test_shorter_and_longer_intervals_lose_more():
    best = best_interval_s(SYNC, 10_800)
    shares = [goodput(SYNC, 10_800, interval_s=best * factor, seeds=40) for factor in (0.2, 1, 5)]
    assert shares[1] > shares[0] + 0.02 and shares[1] > shares[2] + 0.02


def test_without_failures_only_the_stalls_are_lost():
    assert simulate(Saving(10, 20, 30), 1e15, interval_s=100) == pytest.approx(0.9, abs=1e-3)


def test_work_since_the_last_durable_checkpoint_is_lost():
    """Failures so frequent that no save is ever written to its end leave nothing."""
    assert goodput(Saving(10, 500, 0), 20, interval_s=600) < 1e-3  # the last seconds of the ten days
