"""Attempts at a run, and the end of trying."""

import json

import pytest

from vlp.training import history
from vlp.training.exits import Exit, StopRun
from vlp.training.run_dir import Record


def fail(record: Record, directory, *, at: int, code: int | None, place: str | None = None) -> None:
    """One attempt that fails at a step; without a code it is killed at `place`."""
    number = history.begin(record, directory, session=f"s{record.values.get('attempts', 0)}", step=at, world_size=2)
    folder = directory / "ranks" / f"s{number - 1}"
    folder.mkdir(parents=True)
    if place:
        (folder / "beat-0").write_text(json.dumps({"step": at, "place": place, "first_step": place == "start"}))
    if code is not None:
        history.end(record, step=at, code=code, reason="poison")


def held(record, directory, hold_after=3) -> bool:
    try:
        history.refuse_crash_loop(record.values, directory, hold_after=hold_after)
    except StopRun as stop:
        assert stop.code == Exit.RESUME_REFUSED
        return True
    return False


@pytest.mark.parametrize("code", [Exit.BUG, Exit.COLLECTIVE_TIMEOUT, Exit.NON_FINITE, None])
def test_three_failures_at_one_step_hold_the_run(tmp_path, code):
    record = Record(tmp_path, writes=True)
    for number in range(3):
        assert not held(record, tmp_path)
        fail(record, tmp_path, at=7, code=code, place="backward")
        assert [entry["attempt"] for entry in record.values["history"]] == list(range(1, number + 2))
    assert held(record, tmp_path) and not held(record, tmp_path, hold_after=4) and not held(record, tmp_path, None)


def test_the_message_names_step_reason_and_the_way_on(tmp_path):
    record = Record(tmp_path, writes=True)
    for _ in range(3):
        fail(record, tmp_path, at=7, code=80)
    with pytest.raises(StopRun, match=r"3 attempts failed at step 7 \(exit 80: poison\).*raise run\.hold_after"):
        history.refuse_crash_loop(record.values, tmp_path, hold_after=3)


@pytest.mark.parametrize("codes", [[70, 75, 70, 70], [70, 70, 0, 70], [None, None, None]])
def test_preemptions_successes_and_kills_while_starting_are_no_loop(tmp_path, codes):
    record = Record(tmp_path, writes=True)
    for code in codes:
        fail(record, tmp_path, at=7, code=code, place="start")
    assert not held(record, tmp_path)


def test_failures_at_other_steps_are_no_loop(tmp_path):
    record = Record(tmp_path, writes=True)
    for step in (7, 8, 7):
        fail(record, tmp_path, at=step, code=70)
    assert not held(record, tmp_path)


def test_a_killed_attempt_is_given_the_step_of_its_last_beat(tmp_path):
    record = Record(tmp_path, writes=True)
    fail(record, tmp_path, at=7, code=None, place="forward")
    entry = history.closed(record.values, tmp_path)[0]
    assert (entry["to"], entry["reason"]) == (7, "killed in step 7, at 'forward'")
