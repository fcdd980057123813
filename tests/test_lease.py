"""Who owns a run directory: one process at a time, whatever the file system, and never one that is dead."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from vlp import process
from vlp.training import lease
from vlp.training.exits import Exit, StopRun

FORK = multiprocessing.get_context("fork")
ELSEWHERE = {"host": "node7/abcd/pid:[1]", "pid": 4, "born": 5, "is_free": False}


def elsewhere(directory: Path, beat: int) -> None:
    """Write the lease of a process on another machine."""
    (directory / "lease-000006").write_text(json.dumps({**ELSEWHERE, "beat": beat}).ljust(255) + "\n")


def test_numbers_only_grow_and_one_file_is_left(tmp_path):
    for number in (1, 2, 3):
        with lease.held(tmp_path) as own:
            assert own.number == number and os.listdir(tmp_path) == [f"lease-{number:06d}"]
            own.check()


def race(directory: Path, wins, losses, start, refused) -> None:
    start.wait()
    try:
        with lease.held(directory):
            wins.put(os.getpid())
            refused.wait(20)
    except StopRun as stop:
        losses.put((stop.code, stop.message))
        refused.set()


def test_of_two_processes_that_race_a_hundred_times_exactly_one_wins(tmp_path):
    for _ in range(100):
        wins, losses, start, refused = FORK.SimpleQueue(), FORK.SimpleQueue(), FORK.Event(), FORK.Event()
        both = [FORK.Process(target=race, args=(tmp_path, wins, losses, start, refused)) for _ in range(2)]
        for each in both:
            each.start()
        start.set()
        for each in both:
            each.join()
        assert not wins.empty() and not losses.empty()
        winner, (code, message) = wins.get(), losses.get()
        assert code == Exit.LOCKED == 77 and f"in use by process {winner} on " in message
        assert wins.empty() and losses.empty()


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path):
    holder = FORK.Process(target=lambda: (lease.acquire(tmp_path), time.sleep(60)))
    holder.start()
    while not list(tmp_path.glob("lease-*")):
        time.sleep(0.01)
    with pytest.raises(StopRun, match=f"process {holder.pid} on "):
        lease.acquire(tmp_path)
    holder.kill()
    holder.join()
    with lease.held(tmp_path) as own:
        assert own.number == 2


def test_an_owner_elsewhere_that_shows_life_is_believed_within_five_seconds(tmp_path):
    elsewhere(tmp_path, beat=1)
    beating = FORK.Process(target=lambda: [(time.sleep(1), elsewhere(tmp_path, beat)) for beat in range(2, 9)])
    beating.start()
    began = time.monotonic()
    with pytest.raises(StopRun, match="process 4 on node7"):
        lease.acquire(tmp_path)
    assert time.monotonic() - began < 5
    beating.kill()


def test_an_owner_elsewhere_that_shows_none_is_replaced(tmp_path):
    elsewhere(tmp_path, beat=1)
    with lease.held(tmp_path, stale_s=0.5) as own:
        assert own.number == 7


def test_who_was_replaced_while_it_stood_still_saves_nothing_and_gives_nothing_back(tmp_path):
    with lease.held(tmp_path) as own:
        (tmp_path / "lease-000002").write_text(json.dumps({**ELSEWHERE, "beat": 0}))
        (tmp_path / "lease-000001").unlink()
        with pytest.raises(StopRun, match="taken over by process 4 on node7") as stop:
            own.check()
    assert stop.value.code == Exit.LOCKED and os.listdir(tmp_path) == ["lease-000002"]


def test_a_process_is_known_by_its_number_and_the_time_it_was_given():
    own = process.Process.own()
    assert not process.is_gone(own) and process.is_gone(own._replace(born=own.born + 1))
    child = FORK.Process(target=lambda: os.kill(os.getpid(), signal.SIGKILL))
    child.start()
    time.sleep(0.3)  # a zombie, until it is joined
    assert process.is_gone(own._replace(pid=child.pid, born=process._stat(child.pid)[1]))
    child.join()
    assert process.is_gone(own._replace(pid=child.pid)) and not process.is_gone(own._replace(host="elsewhere", pid=1))
