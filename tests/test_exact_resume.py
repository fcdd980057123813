"""A small share of the harnesses; `python tests/exact_resume.py` and `python tests/preempt.py 20` are the whole."""

import exact_resume
import preempt
import pytest
from forked_ranks import toy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of three ranks, where the layout of the buckets shows in the last bits."""
    place = tmp_path_factory.mktemp("exact")
    cfg = toy(place, "x", "trainer.max_steps=3")
    exact_resume.whole(place, cfg, "whole3", world=3)
    return place, cfg


@pytest.mark.slow
@pytest.mark.parametrize("kind", exact_resume.KINDS)
def test_a_run_struck_in_every_step_is_the_unbroken_one_bit_for_bit(whole, kind):
    place, cfg = whole
    found = exact_resume.chain(place, cfg, kind, world=3, kind=kind, steps=3, seed=1)
    assert (found.different, found.lost, found.wrong_codes) == (0, 0, []) and found.struck >= 2


@pytest.mark.slow
def test_warned_preemptions_lose_no_step(tmp_path):
    count = preempt.run(tmp_path, preemptions=4, seed=2)
    assert count.preemptions == 4
    assert (count.lost, count.different, count.finished) == (0, 0, True)
    assert set(count.codes) <= {0, 75}


def test_the_table_shows_what_differs(tmp_path):
    run, row = tmp_path / "runs" / "broken", '{"step": %d, "ids": [1], "loss": "0x1p+0", "weights": "%s"}\n'
    for name, weights in (("whole1", "aa"), ("broken", "ab")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "ledger.jsonl").write_text(row % (1, weights) + row % (2, "cc"))
    assert exact_resume.compared(tmp_path, run, "whole1") == (2, 1)
