"""Signals to real processes started as a user starts them: while they import, and to the ranks of a launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_ranks import TOY

from vlp import process
from vlp.training import signals
from vlp.training.callbacks import Saving
from vlp.training.checkpoint import State
from vlp.training.exits import Exit
from vlp.training.saver import Saver
from vlp.training.stopping import Wish

ROOT = Path(__file__).parents[1]


def started(place: Path, name: str, *more: str) -> subprocess.Popen:
    places = [f"paths.runs={place / 'runs'}", f"paths.data={place / 'data'}", f"run.name={name}"]
    line = [sys.executable, "train.py", *TOY, *places, *more]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> object:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def beat(run: Path, rank: int) -> dict:
    try:
        return json.loads(next(run.glob(f"ranks/*/beat-{rank}")).read_text())
    except (StopIteration, ValueError):
        return {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1])
def test_a_signal_while_the_process_imports_ends_it_with_75_and_nothing_to_save(place, number):
    run = started(place, f"early{number}", "trainer.max_steps=2")
    wait_for(lambda: "libtorch" in Path(f"/proc/{run.pid}/maps").read_text())  # the import of torch has begun
    run.send_signal(number)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == Exit.PREEMPTED == 75, output
    assert f"stopped by {signal.Signals(number).name} before the first step" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_signal_to_one_rank_of_a_launcher_stops_and_saves_all(place):
    run = place / "runs" / "one_rank"
    main = started(place, "one_rank", "trainer.max_steps=100000", "trainer.devices=2", "trainer.strategy=ddp")
    wait_for(lambda: beat(run, 1).get("step", 0) >= 2)
    os.kill(beat(run, 1)["pid"], signal.SIGUSR1)
    output, _ = main.communicate(timeout=120)
    assert main.returncode == 75, output
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert max(row.get("step", 0) for row in ledger) == max(row.get("committed", 0) for row in ledger)


@pytest.mark.slow
def test_no_rank_outlives_a_launcher_that_is_killed_and_the_directory_is_free(place):
    run = place / "runs" / "orphan"
    words = ("trainer.max_steps=100000", "trainer.devices=2", "trainer.strategy=ddp", "data.num_workers=1")
    main = started(place, "orphan", *words)
    child = wait_for(lambda: beat(run, 1).get("step", 0) >= 2 and beat(run, 1))
    os.kill(child["pid"], signal.SIGSTOP)  # even one that stands still
    main.kill()
    main.wait()
    born = process.Process(child["host"], child["pid"], child["born"])
    wait_for(lambda: process.is_gone(born), seconds=30)
    again = started(place, "orphan", *words, "run.stop_after=1")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 75, output


def test_signals_set_a_flag_and_the_handlers_are_given_back():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.listening():
        assert signals.told() is None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.told() == "SIGTERM" and Wish(steps=None, seconds=None)() == "by SIGTERM"
    assert signals.told() is None and [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_what_is_told_is_known_for_as_long_as_the_process_listens():
    with signals.listening():
        with signals.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.told() == "SIGUSR1"
    assert signals.told() is None


def test_a_helper_process_that_is_started_while_signals_are_held_does_not_die_of_them():
    with signals.held():
        helper = subprocess.Popen(["sleep", "20"])
    for number in signals.SIGNALS:
        helper.send_signal(number)
    time.sleep(0.2)
    assert helper.poll() is None
    helper.kill()
    helper.wait()


def test_a_run_stops_while_a_step_and_two_saves_still_fit_into_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    wish = Wish(steps=None, seconds=100.0)
    for _ in range(6):
        now[0] += 10.0
        wish.count_step()
        wish.count_save(5.0)
    assert wish() is None  # 40 s are left; 5 to spare, 10 for a step, 10 for two saves
    now[0] += 16.0
    assert wish() == "before the time of the job is over"


def test_a_save_in_the_background_is_given_the_time_of_its_commit(tmp_path):
    saver, wish = Saver(tmp_path, keep=2, background=True), Wish(steps=None, seconds=100.0)
    saving = Saving(saver, lambda *_: None, wish=wish)
    saver.save(1, State({}, {}), then=lambda: None)
    saver.settle()
    saver.times["time/checkpoint_commit_s"] = 60.0  # a disk that took so long
    saving._log(None, SimpleNamespace(cursor=1))
    assert wish.save_s >= 60.0 and wish() == "before the time of the job is over"
