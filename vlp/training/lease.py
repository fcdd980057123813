"""Who owns a run directory: a numbered lease that is kept alive, because not every file system has locks.

    runs/NAME/lease-000017    the owner's process, a count that it raises every second, whether it has given it back

To own is to be the first to create the file of the next number, which every file system decides the same way. The
number is the fencing token: an owner that was taken for dead finds a higher one before it gives a checkpoint its name,
at the latest, and stops.
"""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vlp.process import Process, is_gone
from vlp.training.exits import Exit, StopRun

BEAT_S = 1.0
STALE_S = 30.0  # an owner on another machine that shows no life for so long is dead
_NAME = re.compile(r"lease-(\d{6})")


class _Holder(NamedTuple):
    number: int
    process: Process
    beat: int
    is_free: bool


class Lease:
    """An acquired lease; its thread keeps it alive until `release`."""

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number = directory, number
        self._own, self._beat, self._stopped = Process.own(), 0, threading.Event()
        self._taken_by: _Holder | None = None  # as the thread has seen it
        self._thread = threading.Thread(target=self._keep_alive, daemon=True, name="lease")
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Has another process taken over, as far as is known without a look?"""
        return self._taken_by is not None

    def check(self) -> None:
        """Look whether another process has taken over.

        Raises:
            StopRun: it has, because this one showed no life for too long (exit 77).
        """
        newest = _newest(self.directory)
        if newest is not None and newest.number > self.number:
            self._taken_by = newest
        self.check_seen()

    def check_seen(self) -> None:
        """As `check`, by what the thread has seen a second ago: nothing waits for the disk."""
        if self._taken_by is not None:
            raise StopRun(
                Exit.LOCKED,
                f"{self.directory} was taken over by {_name(self._taken_by)} while this process stood still; it saves "
                "nothing more. Let the other one go on.",
            )

    def release(self) -> None:
        """Give the directory back; the number stays, so that tokens only grow."""
        self._stopped.set()
        self._thread.join()
        if self.is_lost:
            return
        with contextlib.suppress(OSError):
            _write(_path(self.directory, self.number), self._own, self._beat, is_free=True)

    def _keep_alive(self) -> None:
        while not self._stopped.wait(BEAT_S):
            self._beat += 1
            with contextlib.suppress(OSError, StopRun):  # a full or absent disk; `check` decides before each save
                self.check()
                _write(_path(self.directory, self.number), self._own, self._beat)
            if self.is_lost:
                return


@contextmanager
def held(directory: Path, *, stale_s: float = STALE_S) -> Iterator[Lease]:
    """Own a directory inside the block.

    Raises:
        StopRun: a living process owns it (exit 77).
    """
    lease = acquire(directory, stale_s=stale_s)
    try:
        yield lease
    finally:
        lease.release()


def acquire(directory: Path, *, stale_s: float = STALE_S) -> Lease:
    """Take the next lease as soon as the last owner has given it back or is dead.

    Raises:
        StopRun: a living process owns it (exit 77); said as soon as it shows life.
    """
    while True:
        holder = _newest(directory)
        if holder is not None and not holder.is_free:
            _wait_for_death(directory, holder, stale_s)
        number = holder.number + 1 if holder else 1
        if _create(directory, number):
            for path in directory.glob("lease-*"):
                if (match := _NAME.fullmatch(path.name)) and int(match[1]) < number:
                    path.unlink(missing_ok=True)
            return Lease(directory, number)


def _wait_for_death(directory: Path, holder: _Holder, stale_s: float) -> None:
    """Return when the holder is dead, at once on its own machine. Raises StopRun when it lives."""
    if holder.process.host == Process.own().host:
        if is_gone(holder.process):
            return
        _refuse(directory, holder)
    deadline = time.monotonic() + stale_s
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _newest(directory)
        if now is None or now.number != holder.number or now.is_free:
            return  # it changed hands: `acquire` looks again
        if now.beat != holder.beat:
            _refuse(directory, now)


def _refuse(directory: Path, holder: _Holder) -> None:
    message = f"{directory} is in use by {_name(holder)}; stop it or choose another run.name."
    raise StopRun(Exit.LOCKED, message)


def _name(holder: _Holder) -> str:
    return f"process {holder.process.pid} on {holder.process.node}"


def _newest(directory: Path) -> _Holder | None:
    """Return the holder of the highest number; a file that is being written is read again."""
    for _ in range(50):
        numbers = sorted(int(match[1]) for name in os.listdir(directory) if (match := _NAME.fullmatch(name)))
        if not numbers:
            return None
        try:
            values = json.loads(_path(directory, numbers[-1]).read_text(encoding="utf-8"))
            process = Process(values["host"], values["pid"], values["born"])
            return _Holder(numbers[-1], process, values["beat"], values["is_free"])
        except (FileNotFoundError, ValueError):
            time.sleep(0.02)
    raise StopRun(
        Exit.LOCKED, f"{_path(directory, numbers[-1])} cannot be read; if no process uses the run, delete it."
    )


def _create(directory: Path, number: int) -> bool:
    """Create the file of a number with its content, unless another process was first."""
    temporary = directory / f".lease-{os.getpid()}-{threading.get_ident()}"
    _write(temporary, Process.own(), 0)
    try:
        os.link(temporary, _path(directory, number))  # fails if it exists, on network file systems too
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _write(path: Path, process: Process, beat: int, *, is_free: bool = False) -> None:
    """Write in place and always as many bytes, so that a full disk stops no beat."""
    values: dict[str, Any] = {**process._asdict(), "beat": beat, "is_free": is_free}
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o640)
    with os.fdopen(descriptor, "wb") as file:
        file.write(json.dumps(values).encode().ljust(255) + b"\n")


def _path(directory: Path, number: int) -> Path:
    return directory / f"lease-{number:06d}"
