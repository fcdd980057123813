"""From whatever was raised to how the run ends: the exit code, one line with cause and remedy, and who says it.

What all ranks raise alike is said once; what only one raises ends all of them, with its code.
"""

import re
import resource
import sys
import threading
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as torch_dist

from vlp.config import ConfigError
from vlp.data.storage import StorageError
from vlp.training import redact
from vlp.training.callbacks import DataBudgetError
from vlp.training.exits import Exit, StopRun
from vlp.training.guard import NonFiniteError, SpikeError
from vlp.training.replicas import DivergedError
from vlp.training.watchdog import Watchdog

_CODES: dict[type[Exception], Exit] = {
    NonFiniteError: Exit.NON_FINITE,
    SpikeError: Exit.SPIKE_BUDGET,
    DataBudgetError: Exit.DATA_BUDGET,
    DivergedError: Exit.DIVERGED,
    StorageError: Exit.STORAGE,
    ConfigError: Exit.BAD_CONFIG,
}
# What gloo, NCCL and torch's store write when a peer is gone or too late; torch raises plain RuntimeErrors for many.
_COLLECTIVE = re.compile(
    r"gloo|Connection (?:closed|reset) by peer|Timed out waiting|NCCL|Broken pipe|Socket Timeout|store.*timeout"
    r"|Watchdog caught collective|recvValue failed|failed to (?:recv|send)",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory|bad_alloc", re.IGNORECASE)


class Cause(NamedTuple):
    """How a run ends because of an exception."""

    code: Exit
    message: str
    is_bug: bool = False  # its traceback is for us


def cause_of(error: BaseException, *, at_first_step: bool) -> Cause:
    """Return the ending that an exception stands for.

    Args:
        error: what was raised. at_first_step: nothing was trained yet in this attempt, so a part may not fit another.
    """
    if isinstance(error, StopRun):
        return Cause(error.code, error.message)
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return Cause(code, str(error))
    if is_out_of_memory(error):
        return Cause(Exit.BUG, _memory_message(error))
    if is_collective(error):
        return Cause(Exit.COLLECTIVE_TIMEOUT, _first_line(error))
    if isinstance(error, ValueError) and at_first_step and _refused_by_a_part(error):
        return Cause(Exit.BAD_CONFIG, str(error))
    return Cause(Exit.BUG, f"{type(error).__name__}: {_first_line(error)}", is_bug=True)


def end_by(error: BaseException, watchdog: Watchdog, *, rank: int, at_first_step: bool, quietly: bool = False) -> Exit:
    """Tell the other ranks and the user why this rank stops, unless another rank has said it already.

    Args:
        error: what was raised. watchdog: of this rank. rank: its number. at_first_step: see `cause_of`.
        quietly: the caller prints the message.

    Returns:
        the exit code. If another rank's cause was first, the watchdog ends this process inside the call, quietly.
    """
    cause = cause_of(error, at_first_step=at_first_step)
    if cause.code == Exit.COLLECTIVE_TIMEOUT:
        said = watchdog.find_cause(cause.message)
    else:
        said = watchdog.declare(cause.code, redact.text(cause.message))
    if said.rank != rank:
        threading.Event().wait()
    if cause.is_bug and not quietly:
        print(redact.text("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    if not quietly:
        print(f"stopped: {said.message}", file=sys.stderr, flush=True)
    return Exit(said.code)


def is_collective(error: BaseException) -> bool:
    """Tell whether another rank may be the cause: a collective lost its peers or its patience."""
    if isinstance(error, torch_dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_COLLECTIVE.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on the host or on the device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_MEMORY.search(str(error)))


def memory_summary() -> str:
    """Return what this process holds, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    text = f"host peak {peak:.1f} GiB"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        allocated, peak_device = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        text += f", device {allocated:.1f} GiB in tensors (peak {peak_device:.1f}), {free / 2**30:.1f} GiB free"
        text += f" of {total / 2**30:.1f}"
    return text


def _memory_message(error: BaseException) -> str:
    remedy = "lower data.batch_size or raise trainer.accumulate, or set trainer.checkpoint_activations=true"
    return f"out of memory ({memory_summary()}); {remedy}. {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refused_by_a_part(error: BaseException) -> bool:
    """Tell whether a part of ours raised it: only the first batch shows that a pool finds no class token."""
    *_, innermost = traceback.extract_tb(error.__traceback__)
    return Path(innermost.filename).is_relative_to(Path(__file__).parents[1])
