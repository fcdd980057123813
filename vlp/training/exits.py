"""Exit codes: documented, stable, and the only thing a scheduler needs to read."""

import os
import sys
from collections.abc import Callable
from enum import IntEnum

from vlp.config import ConfigError
from vlp.training import redact


class Exit(IntEnum):
    """How a run ended. Only PREEMPTED and COLLECTIVE_TIMEOUT ask to be queued again."""

    DONE = 0
    DATA_BUDGET = 65  # too many unusable samples, or none at all
    BUG = 70
    CANNOT_CREATE = 73  # the run directory cannot be written
    STORAGE = 74  # storage failed after retries
    PREEMPTED = 75  # committed; queue me again
    RESUME_REFUSED = 76
    LOCKED = 77  # another process owns the run directory
    BAD_CONFIG = 78
    NON_FINITE = 79
    COLLECTIVE_TIMEOUT = 80
    SPIKE_BUDGET = 81
    NO_VALID_CHECKPOINT = 82  # there was progress, but nothing can be loaded
    DIVERGED = 83


left_behind: list[str] = []  # threads that wait for something outside; the end of the interpreter would wait for them


class StopRun(Exception):  # noqa: N818  (it is an ending, not always an error)
    """End the process with a code and one line for the user."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


def reported(command: Callable[[], int]) -> int:
    """Return the exit code of a command; the user's own mistakes cost a line each and never a traceback."""
    try:
        return command()
    except ConfigError as error:
        print(redact.text("\n".join(f"config: {line}" for line in error.messages)), file=sys.stderr)
        return Exit.BAD_CONFIG
    except StopRun as stop:
        print(redact.text(stop.message), file=sys.stderr)
        return stop.code


def leave(code: int) -> None:
    """End the process; without ceremony if something that was left behind would keep it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if left_behind:
        os._exit(code)
    sys.exit(code)
