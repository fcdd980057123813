"""Worker processes that work on jobs and return the results in order, whatever a decoder does to them.

A job is an integer, its result a pure function of it. So a worker that is killed or hangs is replaced and its jobs are
given again: the stream of results does not change. Nobody shares a lock or a queue, so a kill cannot block the others.
A sample that takes its worker down twice is left out of its job, by reason.

torch's DataLoader is not used: a dead worker raises out of a signal handler at any line of the trainer, a hung one
blocks without end, and both end the run.
"""

import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.multiprocessing  # teaches pickle to pass tensors in shared memory by their handle

from vlp.types import Reason

log = logging.getLogger(__name__)

_SIGNALS = (
    signal.SIGUSR1,
    signal.SIGTERM,
    signal.SIGINT,
)  # sent to every process of a job: the trainer decides, not we
_START_FACTOR = 10  # a process that imports its modules may take this many times longer than a sample


class Workers(NamedTuple):
    """How many processes read, how far ahead, and when one of them counts as hanging."""

    num_workers: int = 2  # 0 = in this process, without protection
    prefetch: int = 2  # jobs in flight for each worker
    stall_s: float = 30.0  # a worker that begins no sample for so long hangs
    max_restarts: int = 5  # within an hour; restarts that one sample explains are not counted
    start_method: str | None = None  # "fork" or "spawn"; None = the default of the platform


class Job(Protocol):
    """What a worker does. It calls `begin(slot)` before each sample and leaves out the slots in `skip`, by reason."""

    def __call__(self, job: int, *, begin: Callable[[int], None], skip: Mapping[int, Reason]) -> Any: ...


class WorkerError(RuntimeError):
    """Workers died or hung too often."""


def ordered(work: Job, jobs: Iterable[int], workers: Workers) -> Iterator[Any]:
    """Yield `work(job)` for each job, in order. Close the generator, or exhaust it, to end the processes.

    Raises WorkerError after more than `max_restarts` unexplained restarts in an hour, and whatever `work` raises.
    """
    if workers.num_workers == 0:
        for job in jobs:
            yield work(job, begin=lambda slot: None, skip={})
        return
    pool = _Pool(work, workers)
    try:
        yield from pool.results(iter(jobs))
    finally:
        pool.close()


class _Lost(Exception):
    """A worker is gone (DECODE_CRASH) or hangs (DECODE_TIMEOUT)."""

    def __init__(self, reason: Reason, how: str) -> None:
        super().__init__(reason, how)
        self.reason, self.how = reason, how


class _Failed(NamedTuple):
    """An exception of the work, in a form that can always be sent."""

    kind: type[Exception]
    message: str


class _Worker:
    """One process, its pipe, and the jobs whose results have not been taken yet."""

    def __init__(self, work: Job, workers: Workers) -> None:
        self._work, self._stall_s = work, workers.stall_s
        self._context: Any = multiprocessing.get_context(workers.start_method)
        self.pending: deque[int] = deque()
        self.start({})

    def start(self, skips: Mapping[int, dict[int, Reason]]) -> None:
        """Start the process and give it the pending jobs."""
        # What the worker is at, without a lock: number of samples begun (0 = starting), job and slot of the last one.
        self.beat = self._context.RawArray("q", [0, -1, -1])
        self._connection, theirs = self._context.Pipe()
        arguments = (self._work, theirs, self.beat, os.getpid())
        self._process = self._context.Process(target=_run, args=arguments, daemon=True)
        with _signals_held():
            self._process.start()
        theirs.close()  # the last copy here: a dead worker is seen as the end of the pipe
        # Runs before multiprocessing, at exit, waits for the processes that ignore its SIGTERM.
        self.kill = Finalize(self, _kill, args=(self._process, self._connection), exitpriority=1)
        for job in self.pending:
            self._send(job, skips)

    def give(self, job: int, skips: Mapping[int, dict[int, Reason]]) -> None:
        """Add a job."""
        self.pending.append(job)
        self._send(job, skips)

    def take(self) -> Any:
        """Wait for the result of the oldest job. Raises _Lost."""
        seen, since = self.beat[0], time.monotonic()
        while not self._connection.poll(min(1.0, self._stall_s)):
            if seen != self.beat[0]:
                seen, since = self.beat[0], time.monotonic()
            elif time.monotonic() - since > self._stall_s * (1 if seen else _START_FACTOR):
                raise _Lost(Reason.DECODE_TIMEOUT, f"hung for {time.monotonic() - since:.0f} s")
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:  # also when it dies after sending a handle of shared memory
            self._process.join(1)
            raise _Lost(Reason.DECODE_CRASH, f"died (exit code {self._process.exitcode})") from error

    def _send(self, job: int, skips: Mapping[int, dict[int, Reason]]) -> None:
        with suppress(ConnectionError):  # dead: the next `take` says so
            self._connection.send((job, skips.get(job, {})))


class _Pool:
    def __init__(self, work: Job, workers: Workers) -> None:
        self._settings = workers
        self._skips: dict[int, dict[int, Reason]] = {}
        self._suspects: set[tuple[int, int]] = set()
        self._restarts: list[float] = []
        self._workers = [_Worker(work, workers) for _ in range(workers.num_workers)]

    def results(self, jobs: Iterator[int]) -> Iterator[Any]:
        """Deal jobs and take results in the same round, so that no order has to be remembered."""
        givers, takers = itertools.cycle(self._workers), itertools.cycle(self._workers)
        for job in itertools.islice(jobs, self._settings.num_workers * self._settings.prefetch):
            next(givers).give(job, self._skips)
        while (worker := next(takers)).pending:
            result = self._take(worker)
            for job in itertools.islice(jobs, 1):
                next(givers).give(job, self._skips)
            yield result

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _take(self, worker: _Worker) -> Any:
        while True:
            try:
                result = worker.take()
            except _Lost as lost:
                self._restart(worker, lost)
                continue
            worker.pending.popleft()
            if isinstance(result, _Failed):
                raise result.kind(result.message)
            return _map(result, np.ndarray, torch.from_numpy)

    def _restart(self, worker: _Worker, lost: _Lost) -> None:
        worker.kill()
        _, job, slot = worker.beat
        skip = self._skips.setdefault(job, {})
        if (job, slot) in self._suspects and slot not in skip:
            skip[slot] = lost.reason
            self._restarts.pop()  # the sample explains it, and the time before
        else:
            self._restarts.append(time.monotonic())
        if slot >= 0:
            self._suspects.add((job, slot))
        recent = [at for at in self._restarts if time.monotonic() - at < 3600]
        what = f"a loader worker {lost.how} at job {job}, sample {slot}"
        if len(recent) > self._settings.max_restarts:
            raise WorkerError(
                f"{what}; {len(recent)} restarts within an hour, allowed are max_restarts={self._settings.max_restarts}: "
                "look for a lack of memory or a full /dev/shm on this machine."
            )
        log.warning("%s; its jobs are given to a new one%s", what, ", without that sample" * bool(skip))
        worker.start(self._skips)


def _run(work: Job, connection: Connection, beat: Any, parent: int) -> None:
    """Work until killed: the main function of a worker."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # one process a core; a decoder and its threads would fight for it
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    while True:
        job, skip = connection.recv()

        def begin(slot: int, job: int = job) -> None:
            beat[1], beat[2] = job, slot
            beat[0] += 1

        try:
            result = _map(work(job, begin=begin, skip=skip), torch.Tensor, _unless_shared)
        except ValueError as error:
            result = _Failed(ValueError, str(error))
        except Exception:  # raised again by the trainer
            result = _Failed(RuntimeError, f"in a loader worker, job {job}:\n{traceback.format_exc()}")
        connection.send(result)


def _die_with(parent: int) -> None:
    """Leave when the trainer is gone; the end of the pipe does not tell, because forked siblings hold copies of it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _kill(process: Any, connection: Connection) -> None:
    """End a worker for good; it holds nothing that would need a farewell."""
    process.kill()
    process.join()
    connection.close()


def _unless_shared(tensor: torch.Tensor) -> torch.Tensor | np.ndarray:
    """Small tensors travel in the pipe: a handle of shared memory costs a connection each."""
    return tensor if tensor.is_shared() else tensor.numpy()


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to every `kind` inside tuples and NamedTuples."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple):
        items = [_map(item, kind, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start a process that never sees the trainer's signals, not even before it can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
