"""Saves in the background and not: when they count, and what a failure means."""

import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from vlp.training import checkpoint, lease, tensor_file
from vlp.training.checkpoint import State
from vlp.training.exits import Exit, StopRun
from vlp.training.saver import Saver, Snapshot

MODES = pytest.mark.parametrize("background", [False, True])


def state(value: float) -> State:
    return State({"model/w": torch.full((2, 3), value)}, {"cursor": int(value)})


def saved(root: Path) -> list[float]:
    return [float(checkpoint.open_checkpoint(path).get("model/w")[0, 0]) for path in checkpoint.all_steps(root)]


@pytest.fixture
def held(monkeypatch):
    """A disk that is slow until the event is set."""
    free, write = threading.Event(), tensor_file.write
    monkeypatch.setattr(tensor_file, "write", lambda *args: (free.wait(20), write(*args))[1])
    yield free
    free.set()


def broken(monkeypatch, num_times: int) -> None:
    """Let the next saves fail as on a full disk."""
    left, write = iter(range(num_times)), tensor_file.write

    def refuse(*args):
        if next(left, None) is not None:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(tensor_file, "write", refuse)


@MODES
def test_a_save_is_durable_and_timed_when_it_is_said_to_be(tmp_path, background):
    saver, noted = Saver(tmp_path, keep=2, background=background), []
    saver.save(1, state(1), then=lambda: noted.append(saved(tmp_path)))
    saver.settle()
    assert noted == [[1.0]]
    assert saver.times.keys() == {"time/checkpoint_snapshot_s", "time/checkpoint_commit_s"}


def test_nothing_counts_before_it_is_durable_and_training_goes_on_meanwhile(tmp_path, held):
    saver, noted = Saver(tmp_path, keep=2, background=True), []
    saver.save(1, state(1), then=lambda: noted.append(1))
    saver.poll()
    assert noted == [] == checkpoint.all_steps(tmp_path)
    held.set()
    saver.settle()
    assert noted == [1] and saved(tmp_path) == [1.0]


def test_what_is_written_is_the_state_of_the_step_and_not_what_training_made_of_it(tmp_path, held):
    saver, moving = Saver(tmp_path, keep=2, background=True), state(1)
    saver.save(1, moving, then=lambda: None)
    moving.tensors["model/w"].fill_(99)
    held.set()
    saver.settle()
    assert saved(tmp_path) == [1.0]


def test_a_second_save_waits_for_the_first(tmp_path, held):
    saver, noted = Saver(tmp_path, keep=2, background=True), []
    saver.save(1, state(1), then=lambda: noted.append(1))
    threading.Timer(0.2, held.set).start()
    saver.save(2, state(2), then=lambda: noted.append(2))
    assert noted == [1]
    saver.finish()
    assert noted == [1, 2] and saved(tmp_path) == [1.0, 2.0]


def test_a_kill_between_snapshot_and_commit_leaves_the_previous_checkpoint(tmp_path, held):
    held.set()
    checkpoint.save(tmp_path / "c", step=1, state=state(1), keep=1)
    held.clear()
    pid = os.fork()
    if pid == 0:
        saver = Saver(tmp_path / "c", keep=1, background=True)
        saver.save(2, state(2), then=(tmp_path / "noted").touch)
        saver.poll()
        os.kill(os.getpid(), 9)
    assert os.waitpid(pid, 0)[1] == 9
    assert saved(tmp_path / "c") == [1.0] and not (tmp_path / "noted").exists()


def test_a_run_directory_that_is_lost_while_a_save_is_written_gets_no_checkpoint(tmp_path, held):
    with lease.held(tmp_path) as own:
        saver = Saver(tmp_path / "c", keep=1, background=True, refuse_stranger=own.check)
        saver.save(1, state(1), then=lambda: pytest.fail("noted"))
        other = {"host": "node7", "pid": 4, "born": 5, "is_free": False, "beat": 1}
        (tmp_path / "lease-000002").write_text(json.dumps(other))
        held.set()
        with pytest.raises(StopRun, match="taken over by process 4 on node7") as stop:
            saver.settle()
    assert stop.value.code == Exit.LOCKED and not list((tmp_path / "c").glob("*"))


@MODES
def test_a_failed_save_costs_a_warning_and_the_third_in_a_row_the_run(tmp_path, monkeypatch, capsys, background):
    saver = Saver(tmp_path, keep=2, background=background)
    saver.save(1, state(1), then=lambda: None)
    saver.settle()
    broken(monkeypatch, 3)
    for step in (2, 3):
        saver.save(step, state(step), then=lambda: pytest.fail("noted"))
        saver.settle()
        assert f"warning: the checkpoint of step {step} could not be written" in capsys.readouterr().err
    saver.save(4, state(4), then=lambda: pytest.fail("noted"))
    with pytest.raises(StopRun, match="3 failures in a row") as stop:
        saver.settle()
    assert stop.value.code == Exit.STORAGE == 74 and saved(tmp_path) == [1.0]


@MODES
def test_a_success_in_between_starts_the_count_anew(tmp_path, monkeypatch, background):
    saver = Saver(tmp_path, keep=9, background=background)
    for step in range(1, 9):
        broken(monkeypatch, step % 2)
        saver.save(step, state(step), then=lambda: None)
        saver.settle()
    assert saver.num_failures == 0 and saved(tmp_path) == [2.0, 4.0, 6.0, 8.0]


@MODES
def test_the_last_save_of_an_attempt_is_tried_again_at_once(tmp_path, monkeypatch, background):
    saver, noted = Saver(tmp_path, keep=2, background=background), []
    saver.pause_s = 0.0
    broken(monkeypatch, 2)
    saver.save(7, state(7), then=lambda: noted.append(7))
    saver.finish()
    assert noted == [7] and saved(tmp_path) == [7.0]
    broken(monkeypatch, 3)
    saver.save(8, state(8), then=lambda: noted.append(8))
    with pytest.raises(StopRun):
        saver.finish()
    assert noted == [7]


def test_an_error_that_is_not_of_the_disk_is_raised_and_not_tried_again(tmp_path):
    saver = Saver(tmp_path, keep=2, background=True)
    saver.save(1, State({"model/w": torch.zeros(2, dtype=torch.complex128)}, {}), then=lambda: None)
    with pytest.raises(ValueError, match="complex128"):
        saver.finish()


def test_a_snapshot_copies_every_type_and_shape_and_reuses_its_memory():
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.tensor(True),
        "c": torch.zeros(0, 2),
        "d": torch.ones(5).half(),
    }
    snapshot = Snapshot()
    first = snapshot.take(tensors)
    assert all(torch.equal(first[key], value) and first[key].dtype == value.dtype for key, value in tensors.items())
    tensors["a"].add_(1)
    second = snapshot.take(tensors)
    assert second["a"].data_ptr() == first["a"].data_ptr() and torch.equal(second["a"], tensors["a"])


def end_at_one_step(root: Path, rank: int, world: int) -> dict[str, Tensor]:
    """Poll after every step; rank 1 writes slowly, and its disk is full."""
    saver = Saver(root, keep=2, background=True)
    if rank == 1:
        tensor_file.write = lambda *_: (threading.Event().wait(0.3), (_ for _ in ()).throw(OSError(28, "full")))
    saver.save(1, State({f"model/{rank}": torch.zeros(2)}, {}), then=lambda: None)
    steps = 0
    while saver.num_failures == 0:
        torch.distributed.barrier()
        steps += 1
        saver.poll()
    return {"steps": torch.tensor(steps)}


def test_all_ranks_notice_a_failure_at_the_same_step(tmp_path):
    steps = [int(each["steps"]) for each in on_ranks(partial(end_at_one_step, tmp_path / "c"), 2, tmp_path)]
    assert steps[0] == steps[1] > 1
