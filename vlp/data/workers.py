"""Worker processes that work on jobs and return the results in order, whatever a decoder does to them.

A job is an integer, its result a pure function of it. So a worker that is killed or hangs is replaced and its jobs are
given again: the stream of results does not change. A sample that takes its worker down twice is left out of its job.
One whose bytes are not there is not to blame: it waits for storage, as long as `outage_s`, and the trainer is told.

    trainer --job--> pipe --> worker, result to a slot of shared memory --its place--> pipe --> trainer, a copy of it

Every worker has its own pipe and memory, made once by the trainer. No lock, queue or handle is shared, and what travels
back is one small write: a worker that stops at any instruction blocks nobody.

torch's DataLoader is not used: a dead worker raises out of a signal handler at any line of the trainer, a hung one
blocks without end, and both end the run.
"""

import itertools
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlp.data.outage import OUTAGE_S, Announcer, Outage, Waiting
from vlp.data.sandbox import Sandbox
from vlp.data.storage import OutageError
from vlp.types import Reason

log = logging.getLogger(__name__)

_SIGNALS = (
    signal.SIGUSR1,
    signal.SIGTERM,
    signal.SIGINT,
)  # sent to every process of a job: the trainer decides, not we
_ALIGN = 64
DECODE_S = 10.0  # hundreds of times what a clip takes
_START_FACTOR = 10  # a process that imports its modules may take this many times longer than a sample


class Workers(NamedTuple):
    """How many processes read, how far ahead, and when one of them counts as hanging."""

    num_workers: int = 2  # 0 = in this process, without protection
    prefetch: int = 2  # jobs in flight for each worker
    stall_s: float = 30.0  # a worker that reads at one sample for so long hangs
    decode_s: float = DECODE_S  # and one that has read it, and does not come to the next for so long
    outage_s: float = OUTAGE_S  # storage may give no answer for so long
    max_restarts: int = 5  # within an hour; restarts that one sample explains are not counted
    start_method: str | None = None  # "fork", "spawn" or "forkserver"; None = the default of the platform
    sandbox: Sandbox = Sandbox()  # what the processes may do
    pin_memory: bool = False  # copy large tensors into page-locked memory, from where a GPU takes them faster


class Begin(Protocol):
    """Says that sample `number` of a job begins; that it waits for storage; then, with `loaded`, that it is there."""

    def __call__(self, number: int, *, loaded: bool = False, outage: Outage | None = None) -> None: ...


class Work(Protocol):
    """What is done with a job; the result may hold tensors inside tuples.

    It calls `begin` for each sample, leaves out the samples in `skip`, by reason, and may put contiguous tensors of at
    most `buffer_bytes` in all into `buffer` (uint8), to save a copy.
    """

    buffer_bytes: int

    def __call__(self, job: int, *, begin: Begin, skip: Mapping[int, Reason], buffer: Tensor) -> Any: ...


class WorkerError(RuntimeError):
    """Workers died or hung too often; or the cause, in a worker, of an error raised here."""


def ordered(
    work: Work, jobs: Iterable[int], workers: Workers, waiting: Waiting | None = None
) -> Generator[Any, None, None]:
    """Yield `work(job)` for each job, in order. Close the generator, or exhaust it, to end the processes.

    `waiting` is called in this thread while a result is waited for; without workers, only while storage is away.

    Raises WorkerError after more than `max_restarts` unexplained restarts in an hour, OutageError where the bytes of a
    sample do not come within `outage_s`, and whatever `work` and `waiting` raise.
    """
    waiting = waiting or Announcer()
    if workers.num_workers == 0:
        for job in jobs:
            buffer = torch.empty(work.buffer_bytes, dtype=torch.uint8)
            yield work(job, begin=_Unseen(waiting), skip={}, buffer=buffer)
        return
    pool = _Pool(work, workers, waiting)
    try:
        yield from pool.results(iter(jobs))
    finally:
        pool.close()


class _Unseen(NamedTuple):
    """Nobody watches, and nobody else can tell of an outage."""

    waiting: Waiting

    def __call__(self, number: int, *, loaded: bool = False, outage: Outage | None = None) -> None:
        if outage is not None:
            self.waiting(outage)


class _LostError(Exception):
    """A worker is gone (DECODE_CRASH) or hangs (DECODE_TIMEOUT; READ_FAILED where no bytes have come yet)."""

    def __init__(self, reason: Reason, how: str) -> None:
        super().__init__(reason, how)
        self.reason, self.how = reason, how


class _Failed(NamedTuple):
    """An exception of the work, in a form that can always be sent."""

    kind: type[Exception]
    message: str
    traceback: str


class _Shortcoming(NamedTuple):
    """What of its sandbox a worker does not have on this machine."""

    text: str


class _Placed(NamedTuple):
    """Where a tensor of the result lies in the slot."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    in_buffer: bool


class _Task(NamedTuple):
    job: int
    slot: int  # of the worker's memory; free again when the result has been taken


class _Worker:
    """One process, its pipe and memory, and the tasks whose results have not been taken yet."""

    def __init__(self, work: Work, workers: Workers, waiting: Waiting) -> None:
        self._work, self._settings, self._waiting = work, workers, waiting
        self._outage: Outage | None = None  # that it told of last
        self.silence: tuple[tuple[int, int], float] | None = None  # a sample that no read brings, and since when
        self._context: Any = multiprocessing.get_context(workers.start_method)
        # Behind the buffer there is room for text and masks, which are far smaller than frames.
        self._slot_bytes = _aligned(work.buffer_bytes + max(1 << 20, work.buffer_bytes // 8))
        self._memory = self._context.RawArray("B", self._slot_bytes * workers.prefetch)
        self._free = deque(range(workers.prefetch))
        self.pending: deque[_Task] = deque()
        self.start({})

    def start(self, skips: Mapping[int, dict[int, Reason]]) -> None:
        """Start the process and give it the pending tasks."""
        # What the worker is at: signs of life (0 = starting), job and number in it of the last sample, is it loaded,
        # does it wait for storage.
        self.beat = self._context.RawArray("q", [0, -1, -1, 0, 0])
        self._connection, theirs = self._context.Pipe()
        slots = (self._memory, self._slot_bytes)
        arguments = (self._work, theirs, slots, self.beat, os.getpid(), self._settings.sandbox)
        self._process = self._context.Process(target=_run, args=arguments, daemon=True)
        with _signals_held():
            self._process.start()
        theirs.close()  # the last copy here: a dead worker is seen as the end of the pipe
        # Runs before multiprocessing, at exit, waits for the processes that its SIGTERM does not reach.
        self.kill = Finalize(self, _kill, args=(self._process, self._connection), exitpriority=1)
        for task in self.pending:
            self._send(task, skips)

    def give(self, job: int, skips: Mapping[int, dict[int, Reason]]) -> None:
        """Add a job."""
        self.pending.append(_Task(job, self._free.popleft()))
        self._send(self.pending[-1], skips)

    def take(self) -> Any:
        """Wait for the result of the oldest job and copy it. Raises _LostError."""
        result = self._receive()
        self.silence = None
        slot = self.pending.popleft().slot
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)[slot * self._slot_bytes :][: self._slot_bytes]
        result = _map(result, _Placed, lambda placed: _copy(placed, memory, self._settings.pin_memory))
        self._free.append(slot)
        return result

    def _receive(self) -> Any:
        while True:
            self._wait()
            try:
                received = self._connection.recv()
            except (EOFError, OSError) as error:
                self._process.join(1)
                raise _LostError(Reason.DECODE_CRASH, f"died (exit code {self._process.exitcode})") from error
            if isinstance(received, Outage):
                self._outage = received
                self._waiting(self._known_outage())
            elif isinstance(received, _Shortcoming):
                _say_once(received.text)
            else:
                return received

    def _wait(self) -> None:
        """Wait until the worker sends something."""
        seen, since = self.beat[0], time.monotonic()
        while not self._connection.poll(min(1.0, self._limit_s())):
            if seen != self.beat[0]:
                seen, since = self.beat[0], time.monotonic()
            elif time.monotonic() - since > self._limit_s():
                reason = Reason.DECODE_TIMEOUT if self.beat[3] or not self.beat[0] else Reason.READ_FAILED
                raise _LostError(reason, f"hung for {time.monotonic() - since:.0f} s")
            self._waiting(self._known_outage())

    def _known_outage(self) -> Outage | None:
        """Return the outage that the worker tells of, or that it cannot tell of because a read does not return."""
        if self.beat[4]:
            return self._outage
        if self.silence is not None and self.silence[0] == (self.beat[1], self.beat[2]) and not self.beat[3]:
            return Outage("local storage", "a read does not return", self.silence[1], self._settings.outage_s)
        return None

    def _limit_s(self) -> float:
        """Return how long the worker may show no sign of life."""
        started, _, _, loaded, _ = self.beat
        if loaded:  # no storage can be slow now
            return self._settings.decode_s
        return self._settings.stall_s * (1 if started else _START_FACTOR)

    def _send(self, task: _Task, skips: Mapping[int, dict[int, Reason]]) -> None:
        with suppress(ConnectionError):  # dead: the next `take` says so
            self._connection.send((task, skips.get(task.job, {})))


class _Pool:
    def __init__(self, work: Work, workers: Workers, waiting: Waiting) -> None:
        self._settings = workers
        self._skips: dict[int, dict[int, Reason]] = {}
        self._suspects: set[tuple[int, int]] = set()
        self._restarts: list[float] = []
        self._workers = [_Worker(work, workers, waiting) for _ in range(workers.num_workers)]

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
            except _LostError as lost:
                self._restart(worker, lost)
                continue
            if isinstance(result, _Failed):
                raise result.kind(result.message) from WorkerError(f"in a loader worker:\n{result.traceback}")
            return result

    def _restart(self, worker: _Worker, lost: _LostError) -> None:
        worker.kill()
        _, job, number, _, _ = worker.beat
        if lost.reason == Reason.READ_FAILED:
            self._blame_storage(worker, lost)
            worker.start(self._skips)
            return
        skip = self._skips.setdefault(job, {})
        if (job, number) in self._suspects and number not in skip:
            skip[number] = lost.reason
            self._restarts.pop()  # the sample explains it, and the time before
        else:
            self._restarts.append(time.monotonic())
        if number >= 0:
            self._suspects.add((job, number))
        recent = [at for at in self._restarts if time.monotonic() - at < 3600]
        what = f"a loader worker {lost.how} at job {job}, sample {number}"
        if len(recent) > self._settings.max_restarts:
            raise WorkerError(
                f"{what}; {len(recent)} restarts within an hour, allowed are "
                f"max_restarts={self._settings.max_restarts}: look for a lack of memory on this machine."
            )
        log.warning("%s; its jobs are given to a new one%s", what, ", without that sample" * bool(skip))
        worker.start(self._skips)

    def _blame_storage(self, worker: _Worker, lost: _LostError) -> None:
        """Let a read that does not return be tried by a new worker until the time of an outage is over."""
        _, job, number, _, _ = worker.beat
        now, at = time.monotonic(), (job, number)
        if worker.silence is None or worker.silence[0] != at:
            worker.silence = (at, now - self._settings.stall_s)
        for_s = now - worker.silence[1]
        if for_s >= self._settings.outage_s:
            limit = f"allowed are data.outage_s={self._settings.outage_s:g}"
            raise OutageError(f"local storage gave no answer (a read does not return) for {for_s:.0f} s, {limit}")
        what = f"a loader worker {lost.how} at job {job}, sample {number}, before its bytes were there"
        log.warning("%s; its jobs are given to a new one", what)


def _run(work: Work, connection: Connection, memory: tuple[Any, int], beat: Any, parent: int, sandbox: Sandbox) -> None:
    """Work until killed: the main function of a worker."""
    torch.set_num_threads(1)  # one process a core; a decoder and its threads would fight for it
    if missing := sandbox.enter():
        connection.send(_Shortcoming(missing))
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    slots = torch.frombuffer(memory[0], dtype=torch.uint8).split(memory[1])
    with suppress(EOFError, ConnectionError):  # the trainer is gone
        while True:
            task, skip = connection.recv()
            connection.send(_result(work, task, skip, slots[task.slot], beat, connection.send))


def _result(
    work: Work, task: _Task, skip: Mapping[int, Reason], slot: Tensor, beat: Any, tell: Callable[[Outage], None]
) -> Any:
    def begin(number: int, *, loaded: bool = False, outage: Outage | None = None) -> None:
        if outage is not None:
            tell(outage)
        beat[1], beat[2], beat[3], beat[4] = task.job, number, loaded, outage is not None
        beat[0] += 1

    beat[3] = beat[4] = False  # before its first sample, a job may ask storage for indexes
    try:
        result = work(task.job, begin=begin, skip=skip, buffer=slot[: work.buffer_bytes])
        return _map(result, Tensor, _Packer(slot, buffer_bytes=work.buffer_bytes))
    except Exception as error:  # raised again by the trainer; a kind of its own could not always be sent
        for kind in (ValueError, OutageError):
            if isinstance(error, kind):
                return _Failed(kind, str(error), traceback.format_exc())
        return _Failed(RuntimeError, f"{type(error).__name__}: {error}", traceback.format_exc())


class _Packer:
    """Puts the tensors of a result into its slot, those that are not there already behind `buffer`."""

    def __init__(self, slot: Tensor, *, buffer_bytes: int) -> None:
        self._slot, self._buffer_bytes, self._used = slot, buffer_bytes, _aligned(buffer_bytes)

    def __call__(self, tensor: Tensor) -> _Placed:
        offset = tensor.data_ptr() - self._slot.data_ptr()
        if 0 <= offset < self._buffer_bytes and tensor.is_contiguous():
            return _Placed(offset, tuple(tensor.shape), tensor.dtype, in_buffer=True)
        placed = _Placed(self._used, tuple(tensor.shape), tensor.dtype, in_buffer=False)
        if placed.offset + tensor.nbytes > len(self._slot):
            raise ValueError(
                "a result has more bytes besides its frames than a slot has room for; shorten tokenizer.max_length."
            )
        _view(placed, self._slot).copy_(tensor)
        self._used = _aligned(placed.offset + tensor.nbytes)
        return placed


@cache
def _say_once(shortcoming: str) -> None:
    log.warning("loader workers have no full sandbox; %s", shortcoming)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def _view(placed: _Placed, slot: Tensor) -> Tensor:
    num_bytes = math.prod(placed.shape) * placed.dtype.itemsize
    return slot[placed.offset : placed.offset + num_bytes].view(placed.dtype).view(placed.shape)


def _copy(placed: _Placed, slot: Tensor, pin_memory: bool) -> Tensor:
    pinned = pin_memory and placed.in_buffer  # small tensors gain nothing
    return torch.empty(placed.shape, dtype=placed.dtype, pin_memory=pinned).copy_(_view(placed, slot))


def _die_with(parent: int) -> None:
    """Leave when the trainer is gone; the end of the pipe does not tell, because forked siblings hold copies of it."""
    trainer, is_child = multiprocessing.parent_process(), os.getppid() == parent
    assert trainer is not None
    while os.getppid() == parent if is_child else trainer.is_alive():  # no child of the trainer's: of a fork server
        time.sleep(1)
    os._exit(0)


def _kill(process: Any, connection: Connection) -> None:
    """End a worker for good; it holds nothing that would need a farewell."""
    process.kill()
    process.join()
    connection.close()


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
    """Hold signals back: a process that is started inside never gets them, not even before its first line."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
