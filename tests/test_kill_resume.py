"""A small share of the kill-and-resume harness; `python tests/kill_resume.py 1000` is the whole."""

from kill_resume import run


def test_kills_lose_repeat_and_change_nothing(tmp_path):
    count = run(tmp_path, cycles=8, seed=1)
    assert count.steps > 8 and (count.lost, count.repeated, count.changed) == (0, 0, 0)
