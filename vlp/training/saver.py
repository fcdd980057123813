"""When checkpoints are written, and what happens when they cannot be.

In the background: the tensors are copied into memory of the CPU at the step boundary, and a thread of this process does
the rest while training goes on. A thread and not a process, because what writes must die with what trains: an orphan
would still write when the next attempt begins. At most one save is in flight; a second one waits for it. The ranks look
at it after every step and take note of its end at the same step, so that none stops alone. Until then nothing says that
the step is saved.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlp import dist
from vlp.training import checkpoint
from vlp.training.checkpoint import State
from vlp.training.exits import Exit, StopRun

_ALIGNMENT = 64  # bytes


class _Job(NamedTuple):
    """A save that was asked for."""

    step: int
    state: State
    then: Callable[[], None]
    snapshot_s: float


class Saver:
    """Commits the checkpoints of a run and decides what a failure means. All ranks make the same calls.

    A failed save leaves the older checkpoints as they are, costs a warning, and is done again at the next interval; the
    third failure in a row ends the run.

    Args:
        root: of the checkpoints. keep, refuse_stranger: see `checkpoint.save`. background: write in a thread.
    """

    max_failures = 3
    pause_s = 1.0  # before the last checkpoint of an attempt is tried again

    def __init__(
        self, root: Path, *, keep: int, background: bool, refuse_stranger: Callable[[], None] = lambda: None
    ) -> None:
        self.root, self.keep, self.background, self.refuse_stranger = root, keep, background, refuse_stranger
        self.times: dict[str, float] = {}  # of the last commit, until somebody takes them
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None  # until it is committed
        self._outcome: Exception | float | None = None  # of the save in flight: what went wrong, or its seconds
        self.num_failures = 0  # in a row

    @property
    def is_busy(self) -> bool:
        """Is a save being written?"""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, state: State, then: Callable[[], None]) -> None:
        """Commit the state of a step now or in the background; `then` is called in this thread once it is durable.

        Raises:
            StopRun: saves have failed three times in a row (exit 74).
        """
        self.settle()
        dist.side_group()  # made by the thread that trains, as every group
        started = time.perf_counter()
        if self.background:
            state = State(self._snapshot.take(state.tensors), state.facts)
        self._job = _Job(step, state, then, time.perf_counter() - started)
        self._start()

    def poll(self) -> None:
        """Take note of the end of a save in flight, if it has ended on all ranks; to be called after every step."""
        if self._outcome is None and self._thread is None:
            return
        if not int(dist.max_over_ranks(_flag(self.is_busy))):
            self.settle()

    def settle(self) -> None:
        """Wait for a save in flight and take note of its end."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, OSError):
            self._fail(outcome)
        elif isinstance(outcome, Exception):
            raise outcome
        elif outcome is not None:
            self._succeed(outcome)

    def finish(self) -> None:
        """See to it that the last state that was given is on the disk.

        Raises:
            StopRun: it cannot be written (exit 74).
        """
        self.settle()
        while self._job is not None:
            time.sleep(self.pause_s)
            self._start()
            self.settle()

    def close(self) -> None:
        """Let a save in flight end, whatever becomes of it: the attempt ends for another reason."""
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self.background:
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write()

    def _write(self) -> None:
        """Commit the job; in the thread, nobody would see an error."""
        assert self._job is not None
        started, job = time.perf_counter(), self._job
        try:
            checkpoint.save(
                self.root, step=job.step, state=job.state, keep=self.keep, refuse_stranger=self.refuse_stranger
            )
            self._outcome = time.perf_counter() - started
        except Exception as error:  # raised where it is settled
            self._outcome = error

    def _succeed(self, seconds: float) -> None:
        assert self._job is not None
        self.num_failures = 0
        self.times = {"time/checkpoint_snapshot_s": self._job.snapshot_s, "time/checkpoint_commit_s": seconds}
        then, self._job = self._job.then, None
        then()

    def _fail(self, error: OSError) -> None:
        assert self._job is not None
        self.num_failures += 1
        what = f"the checkpoint of step {self._job.step} could not be written to {self.root} ({error})"
        if self.num_failures >= self.max_failures:
            message = f"{what}, {self.num_failures} failures in a row; older ones stay. Make room or repair the disk."
            raise StopRun(Exit.STORAGE, message)
        if dist.rank() == 0:
            print(f"warning: {what}; older ones stay, the next save tries again.", file=sys.stderr, flush=True)


class Snapshot:
    """A copy of tensors in one block of CPU memory, which is pinned for a GPU and used again by the next copy."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors; copies that were taken before are overwritten."""
        starts, total = {}, 0
        for name, tensor in tensors.items():
            starts[name] = total
            total += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if len(self._block) < total:
            self._block = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        copies = {}
        for name, tensor in tensors.items():
            flat = self._block[starts[name] : starts[name] + tensor.nbytes]
            copies[name] = flat.view(tensor.dtype).view(tensor.shape)
            if tensor.is_cuda or not tensor.is_contiguous():
                copies[name].copy_(tensor.detach(), non_blocking=True)
            else:  # by one thread: torch's own wait for each other at every tensor, long where cores are shared
                np.copyto(flat.numpy(), tensor.detach().reshape(-1).view(torch.uint8).numpy())
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def _flag(value: bool) -> Tensor:
    """A number for a collective of the default group, which on GPUs takes tensors of a GPU only."""
    device = "cuda" if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl" else "cpu"
    return torch.tensor(int(value), device=device)
