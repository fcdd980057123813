import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vlp.data.outage import Outage
from vlp.data.storage import OutageError
from vlp.data.workers import WorkerError, Workers, ordered
from vlp.types import Reason

FAST = Workers(num_workers=2, stall_s=0.5, decode_s=0.5, start_method="fork")


class Pair(NamedTuple):
    ids: torch.Tensor
    big: torch.Tensor
    job: int


class Work:
    """Three samples a job; does something to its own process at some of them, while `armed` exists."""

    buffer_bytes = 5

    def __init__(
        self,
        *at: tuple[int, int],
        deed: signal.Signals | None = None,
        armed: Path | None = None,
        loaded: bool = True,
    ):
        self.at, self.deed, self.armed, self.loaded = at, deed, armed, loaded

    def __call__(self, job, *, begin, skip, buffer):
        ids = []
        for slot in range(3):
            begin(slot)
            if self.loaded:
                begin(slot, loaded=True)
            ids.append(-skip[slot] if slot in skip else 10 * job + slot)
            if (job, slot) in self.at and slot not in skip and (self.armed is None or self.armed.exists()):
                if self.armed is not None:
                    self.armed.unlink()
                os.kill(os.getpid(), self.deed)
        return Pair(torch.tensor(ids), buffer.fill_(job), job)


class Slow:
    """Sleeps at sample 1 of job 2, before or after its bytes are there."""

    buffer_bytes = 0

    def __init__(self, *, loaded: bool):
        self.loaded = loaded

    def __call__(self, job, *, begin, skip, buffer):
        for number in range(2):
            begin(number)
            if self.loaded:
                begin(number, loaded=True)
            if (job, number) == (2, 1) and number not in skip:
                time.sleep(2.5)
        return -sum(skip.values())


class Fails:
    buffer_bytes = 0

    def __init__(self, error):
        self.error = error

    def __call__(self, job, *, begin, skip, buffer):
        if job == 2:
            raise self.error
        return job


class Pids:
    buffer_bytes = 0

    def __call__(self, job, *, begin, skip, buffer):
        return os.getpid()


class Sends:
    buffer_bytes = 6

    def __init__(self, num_bytes):
        self.num_bytes = num_bytes

    def __call__(self, job, *, begin, skip, buffer):
        turned = buffer.copy_(torch.arange(6)).view(2, 3).T
        return torch.full((self.num_bytes,), job, dtype=torch.uint8), torch.arange(3)[::2] + job, turned


class Fills:
    buffer_bytes = 3 << 20  # more than the room behind it

    def __call__(self, job, *, begin, skip, buffer):
        return tuple(buffer.fill_(job).add_(torch.arange(3, dtype=torch.uint8).repeat_interleave(1 << 20)).chunk(3))


def ids_of(work, settings=FAST, num_jobs=9):
    return [pair.ids.tolist() for pair in ordered(work, range(num_jobs), settings)]


PLAIN = [[10 * job, 10 * job + 1, 10 * job + 2] for job in range(9)]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_results_come_in_order_for_any_number_of_workers(num_workers, prefetch):
    results = list(ordered(Work(), range(9), FAST._replace(num_workers=num_workers, prefetch=prefetch)))
    assert [pair.ids.tolist() for pair in results] == PLAIN
    assert [pair.big.tolist() for pair in results] == [[job] * 5 for job in range(9)]
    assert [pair.job for pair in results] == list(range(9)) and type(results[0]) is Pair


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_workers_started_otherwise_give_the_same(start_method):
    assert ids_of(Work(), Workers(num_workers=1, start_method=start_method)) == PLAIN


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP])
def test_killed_or_stopped_worker_is_replaced_and_nothing_changes(tmp_path, deed, caplog):
    armed = tmp_path / "armed"
    armed.touch()
    with caplog.at_level(logging.WARNING):
        assert ids_of(Work((4, 1), deed=deed, armed=armed)) == PLAIN
    assert "at job 4, sample 1; its jobs are given to a new one" in caplog.text


@pytest.mark.parametrize(
    ("deed", "reason"), [(signal.SIGKILL, Reason.DECODE_CRASH), (signal.SIGSTOP, Reason.DECODE_TIMEOUT)]
)
def test_sample_that_takes_two_workers_down_is_left_out(deed, reason):
    result = ids_of(Work((4, 1), (7, 0), deed=deed), FAST._replace(max_restarts=1))
    assert result == [*PLAIN[:4], [40, -reason, 42], *PLAIN[5:7], [-reason, 71, 72], PLAIN[8]]


@pytest.mark.parametrize(("loaded", "result"), [(True, -Reason.DECODE_TIMEOUT), (False, 0)])
def test_a_slow_decode_hangs_and_a_slow_storage_does_not(loaded, result):
    settings = FAST._replace(stall_s=60.0, decode_s=0.5)
    assert list(ordered(Slow(loaded=loaded), range(5), settings)) == [0, 0, result, 0, 0]


def test_a_read_that_does_not_return_is_tried_by_new_workers_and_blames_no_sample(tmp_path, caplog):
    armed, seen = tmp_path / "armed", []
    armed.touch()
    work = Work((4, 1), deed=signal.SIGSTOP, armed=armed, loaded=False)
    with caplog.at_level(logging.WARNING):
        settings = FAST._replace(max_restarts=0)
        assert [pair.ids.tolist() for pair in ordered(work, range(9), settings, seen.append)] == PLAIN
    assert "at job 4, sample 1, before its bytes were there; its jobs are given to a new one" in caplog.text
    endless = Work((4, 1), deed=signal.SIGSTOP, loaded=False)
    with pytest.raises(OutageError, match=r"a read does not return.*allowed are data\.outage_s=2$"):
        list(ordered(endless, range(9), settings._replace(outage_s=2.0), seen.append))
    assert {outage.text().partition(" for ")[0] for outage in seen if outage} == {
        "local storage gives no answer (a read does not return)"
    }


class Waits:
    """Waits for storage at sample 1 of job 2, far longer than a worker may be silent, and says so."""

    buffer_bytes = 0

    def __init__(self, num_rounds: int, *, lost: bool = False):
        self.num_rounds, self.lost = num_rounds, lost

    def __call__(self, job, *, begin, skip, buffer):
        begin(0)
        for number in range(self.num_rounds if job == 2 else 0):
            begin(1, outage=Outage("s3://bucket", f"attempt {number}", time.monotonic(), 60.0))
            time.sleep(0.2)
        if self.lost and job == 2:
            raise OutageError("s3://bucket gave no answer")
        begin(1, loaded=True)
        return job - sum(skip.values())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_that_waits_for_storage_is_no_hung_one_and_the_trainer_is_told(num_workers):
    seen, settings = [], FAST._replace(num_workers=num_workers, max_restarts=0)
    assert list(ordered(Waits(10), range(5), settings, seen.append)) == [0, 1, 2, 3, 4]
    told = [outage.what for outage in seen if outage]
    assert told and set(told) <= {f"attempt {number}" for number in range(10)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_storage_that_is_lost_is_raised_in_its_place(num_workers):
    results = ordered(Waits(1, lost=True), range(5), FAST._replace(num_workers=num_workers))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OutageError, match=r"^s3://bucket gave no answer$"):
        next(results)


def test_whoever_waits_may_be_called_away():
    def leave(outage):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(ordered(Waits(1000), range(5), FAST, leave))
    assert not multiprocessing.active_children()


def test_unexplained_deaths_end_the_run():
    class DiesAtOnce:
        buffer_bytes = 0

        def __call__(self, job, *, begin, skip, buffer):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerError, match="3 restarts within an hour, allowed are max_restarts=2"):
        list(ordered(DiesAtOnce(), range(3), FAST._replace(num_workers=1, max_restarts=2)))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("size=7 is not 8"), ValueError, "^size=7 is not 8$"),
        (KeyError("caption"), RuntimeError, "^KeyError: 'caption'$"),
    ],
)
def test_error_of_the_work_is_raised_in_its_place(error, kind, message):
    results = ordered(Fails(error), range(5), FAST)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(kind, match=message) as raised:
        next(results)
    assert "test_workers.py" in str(raised.value.__cause__)
    assert not multiprocessing.active_children()


def test_tensors_of_a_result_arrive_whole_until_the_slot_is_full():
    for job, (large, odd, turned) in enumerate(ordered(Sends(1_000_000), range(5), FAST)):
        assert (large == job).all() and odd.tolist() == [job, job + 2]
        assert turned.tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="more bytes besides its frames than a slot has room for"):
        next(ordered(Sends(1_048_700), range(5), FAST))


def test_tensors_that_the_work_wrote_into_the_buffer_stay_there():
    for job, parts in enumerate(ordered(Fills(), range(5), FAST)):
        assert all(len(part) == 1 << 20 and (part == job + number).all() for number, part in enumerate(parts))


def test_workers_ignore_the_signals_of_the_job(tmp_path):
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        assert ids_of(Work((1, 1), deed=number), FAST._replace(max_restarts=0), num_jobs=3) == PLAIN[:3]


def test_closed_generator_leaves_no_process():
    results = ordered(Pids(), range(9), FAST)
    pids = {next(results), next(results)}
    results.close()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def alive(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split(")")[1].split()[0] != "Z"


KEPT = []


def trainer(path: Path, deed: signal.Signals | None, start_method: str):
    results = ordered(Pids(), range(9), FAST._replace(start_method=start_method))
    KEPT.append(results)  # still open at the end
    path.write_text(f"{next(results)} {next(results)}")
    if deed:
        os.kill(os.getpid(), deed)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
@pytest.mark.parametrize("deed", [None, signal.SIGKILL])
def test_workers_end_with_the_trainer(tmp_path, deed, start_method):
    args = (tmp_path / "pids", deed, start_method)
    process = multiprocessing.get_context("spawn").Process(target=trainer, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == (-deed if deed else 0)
    pids, deadline = (tmp_path / "pids").read_text().split(), time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(map(alive, pids))
