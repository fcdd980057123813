"""USR1, TERM and INT: a flag and nothing else, from the first line of the process to its last.

This file imports nothing heavy: `train.py` listens before torch is loaded, which takes seconds in which a scheduler
may already ask the job to go. Who looks at the flag decides what to do: nothing is ever raised out of a handler.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

_received: list[str] = []


def listen() -> None:
    """Let the signals set the flag from now on, also those that were held back until this process began."""
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def listening() -> Iterator[None]:
    """Listen inside the block; at its end, what was told is forgotten where nobody had listened before.

    In the main thread only, which handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    try:
        yield
    finally:
        if _note not in before.values():
            _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Hold the signals back in this thread: a process that is started inside never gets them, unless it listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def told() -> str | None:
    """Return the name of the first signal that asked this process to stop, or None."""
    return _received[0] if _received else None


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
