"""A thread in each rank that tells the others that it lives, and ends its process when one of them does not.

    runs/NAME/ranks/SESSION/beat-R   process, step and place of rank R, rewritten every second
    runs/NAME/ranks/SESSION/ending   the first cause of the end: code, message; written once, by who knows it first
    runs/NAME/crash/rank-R.txt       the stacks of rank R when another one died or hung

Files, because they need no port, outlive every process and work on several nodes. Rank 0 watches all others, they watch
rank 0, so a beat costs each rank two small reads. Times are measured by each process's own monotonic clock and
compared by nobody. The training thread only counts marks (`mark`): no device is asked, nothing waits.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vlp import dist
from vlp.process import Process, is_gone
from vlp.training.exits import Exit

FREE_PLACES = ("start", "save", "evaluation", "end")  # may take as long as they take: a stopped process still shows
_FIRST_STEP = 10  # the first step compiles, warms up and connects: it may take this many times longer
_GOING_S = 5.0  # for a rank that can still run to leave its stacks
_LEAVE_S = 20.0  # after the end is declared, a process that has not left by itself is ended
_BEAT_BYTES = 512  # of one size, so that a full disk refuses no beat
_PR_SET_PDEATHSIG = 1


class Ending(NamedTuple):
    """Why the ranks stop."""

    code: int
    message: str
    rank: int  # that declared it
    culprits: tuple[int, ...] = ()  # ranks that died or hang


class Watchdog:
    """Use as a context: beats begin and end with the block.

    Args:
        directory: of the run. session: the name of this attempt, the same on all ranks.
        timeout_s: a rank that makes no mark, or whose process does not beat, for so long hangs; None = never.
        at_end: called in the thread, on rank 0, before the process ends because of another rank or a hang.
        launcher: the process without which this rank has no reason to live; None = there is none.
    """

    def __init__(
        self,
        directory: Path,
        *,
        session: str,
        rank: int,
        world_size: int,
        timeout_s: float | None,
        at_end: Callable[[Ending], None],
        launcher: int | None = None,
    ) -> None:
        self.place, self.marks, self.step, self.first_step = "start", 0, 0, True
        self._rank, self._world_size, self._timeout_s, self._at_end = rank, world_size, timeout_s, at_end
        self._folder, self._crash, self._launcher = directory / "ranks" / session, directory / "crash", launcher
        self._behind: tuple[Any, float] = (None, 0.0)  # the furthest behind that a rank is, and since when
        self._period_s = min(1.0, (timeout_s or 60.0) / 10)
        self._own, self._state, self._beats = Process.own(), "alive", 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> number of its last beat, and when it was new here
        self._declared_by: int | None = None  # the thread
        self._declared_at = 0.0
        self._stopped, self._last_word = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._launcher is not None:  # a stopped rank wakes up when its launcher dies, and then sees it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._last_word.acquire()  # for good: if the thread is ending this process, nothing else shall happen here
        self._stopped.set()
        self._state = "done"
        self._beat()

    def mark(self, place: str, *, step: int | None = None) -> None:
        """Say where the training thread is; all ranks make the same marks in the same order."""
        self.place, self.marks = place, self.marks + 1
        if step is not None:
            self.first_step = False
            self.step = step

    def declare(self, code: int, message: str, *, culprits: Sequence[int] = ()) -> Ending:
        """Write down why the run ends, and return the cause that counts: the first one, which may be another rank's."""
        ending = Ending(int(code), message, self._rank, tuple(culprits))
        self._folder.mkdir(parents=True, exist_ok=True)  # a new owner of the run directory sweeps it away
        with suppress(FileExistsError):
            descriptor = os.open(self._folder / "ending", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(ending._asdict()))
        if self._declared_by is None:
            self._declared_by, self._declared_at = threading.get_ident(), time.monotonic()
        return self.ending() or ending

    def ending(self) -> Ending | None:
        """Return the first cause, if there is one."""
        values = _read(self._folder / "ending")
        return Ending(**{**values, "culprits": tuple(values["culprits"])}) if values else None

    def find_cause(self, symptom: str) -> Ending:
        """Wait for the cause of a failed collective, which ends this process; if none is found, the symptom is it."""
        patience_s = 10.0 if self._world_size > 1 else 0.0
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if self.ending():
                threading.Event().wait()  # the watching thread has seen it, and ends this process
            time.sleep(0.1)
        return self.declare(Exit.COLLECTIVE_TIMEOUT, f"a collective failed on rank {self._rank}: {symptom}")

    def _run(self) -> None:
        while not self._stopped.wait(self._period_s):
            self._beat()
            with suppress(OSError):  # storage is away: nothing is known, so nothing is decided
                self._check()

    def _check(self) -> None:
        if ending := self.ending():
            self._leave(ending)
        elif ending := self._look():
            if ending.rank == self._rank:
                advice = f"see {self._crash}; the same command goes on from the newest checkpoint."
                print(f"stopped: {ending.message}; {advice}", file=sys.stderr, flush=True)
            self._leave(ending)

    def _beat(self) -> None:
        self._beats += 1
        text = json.dumps(self._values()).encode().ljust(_BEAT_BYTES)
        with suppress(OSError):
            descriptor = os.open(self._folder / f"beat-{self._rank}", os.O_CREAT | os.O_WRONLY, 0o640)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
        if self._timeout_s is not None and self._state == "alive":
            self._arm(self._timeout_s)

    def _values(self) -> dict[str, Any]:
        values = {**self._own._asdict(), "beat": self._beats, "state": self._state, "first_step": self.first_step}
        return values | {"place": self.place, "step": self.step, "marks": self.marks, "collectives": dist.num_entered}

    def _arm(self, timeout_s: float) -> None:
        """Have the stacks written by a thread outside Python if this one is kept from running for so long."""
        if self._world_size > 1:
            if not hasattr(self, "_file"):
                self._file = self._open_crash()
            faulthandler.dump_traceback_later(timeout_s, file=self._file)

    def _open_crash(self) -> Any:
        self._crash.mkdir(exist_ok=True)
        return (self._crash / f"rank-{self._rank}.txt").open("w", encoding="utf-8")

    def _look(self) -> Ending | None:
        """Look at the others; rank 0 at all, all at rank 0."""
        if self._launcher is not None and os.getppid() != self._launcher:
            text = f"the launcher of rank {self._rank} (process {self._launcher}) is gone"
            return self.declare(Exit.COLLECTIVE_TIMEOUT, text)
        others = range(1, self._world_size) if self._rank == 0 else (0,)
        beats = {rank: beat for rank in others if (beat := _read(self._folder / f"beat-{rank}"))}
        for rank, beat in beats.items():
            if beat["state"] == "alive" and (trouble := self._trouble(rank, beat)):
                return self.declare(Exit.COLLECTIVE_TIMEOUT, trouble, culprits=[rank])
        return self._hanging(beats) if self._rank == 0 else None

    def _trouble(self, rank: int, beat: dict[str, Any]) -> str | None:
        process = Process(beat["host"], beat["pid"], beat["born"])
        name = f"rank {rank} (process {process.pid} on {process.node})"
        seen = f"it was last seen in step {beat['step']}, at '{beat['place']}'"
        if is_gone(process) and (_read(self._folder / f"beat-{rank}") or beat)["state"] == "alive":
            return self._unless_declared(f"{name} died; {seen}")
        number, since = self._seen.get(rank, (-1, 0.0))
        if number != beat["beat"]:
            self._seen[rank] = (beat["beat"], time.monotonic())
        elif self._timeout_s is not None and time.monotonic() - since > self._timeout_s:
            waited = f"{time.monotonic() - since:.0f} s, allowed are trainer.timeout_s={self._timeout_s:g}"
            return f"{name} has not answered for {waited}: it is stopped or frozen; {seen}"
        return None

    def _unless_declared(self, text: str) -> str | None:
        return None if self.ending() else text  # it said why before it left

    def _hanging(self, beats: dict[int, dict[str, Any]]) -> Ending | None:
        """Find the ranks that are furthest behind, once they have not moved for too long."""
        everyone = {rank: beat for rank, beat in {0: self._values(), **beats}.items() if beat["state"] == "alive"}
        if not everyone:
            return None  # all of them are about to leave
        behind = min(_position(beat) for beat in everyone.values())
        culprits = [rank for rank, beat in everyone.items() if _position(beat) == behind]
        beat, now = everyone[culprits[0]], time.monotonic()
        if behind != self._behind[0] or beat["place"] in FREE_PLACES:
            self._behind = (behind, now)
        for_s = now - self._behind[1]
        if self._timeout_s is None or for_s <= self._timeout_s * (_FIRST_STEP if beat["first_step"] else 1):
            return None
        names = "all ranks hang" if len(culprits) == self._world_size else f"rank {_listed(culprits)} hangs"
        text = f"{names} in step {beat['step']}, at '{beat['place']}', for {for_s:.0f} s"
        text += f", allowed are trainer.timeout_s={self._timeout_s:g}"
        return self.declare(Exit.COLLECTIVE_TIMEOUT, text, culprits=culprits)

    def _leave(self, ending: Ending) -> None:
        """End this process for good, unless it is about to do so itself."""
        declared_here = ending.rank == self._rank and threading.get_ident() != self._declared_by
        if declared_here and time.monotonic() - self._declared_at < _LEAVE_S:
            return  # the training thread declared it, and is on its way
        if not self._last_word.acquire(blocking=False):
            return
        if ending.code == Exit.COLLECTIVE_TIMEOUT:
            self._dump(ending)
            self._kill(ending.culprits)
        try:
            self._at_end(ending)
        finally:
            os._exit(ending.code)  # the training thread may hang in a collective: it cannot be asked

    def _dump(self, ending: Ending) -> None:
        with suppress(OSError):
            faulthandler.cancel_dump_traceback_later()
            with self._open_crash() as file:
                file.write(f"rank {self._rank}, step {self.step}, at '{self.place}': {ending.message}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)

    def _kill(self, ranks: Sequence[int]) -> None:
        """End the culprits of this machine: one that is stopped, or holds the interpreter, cannot end itself."""
        for rank in ranks:
            beat = _read(self._folder / f"beat-{rank}")
            if not beat or rank == self._rank:
                continue
            process = Process(beat["host"], beat["pid"], beat["born"])
            if process.host == self._own.host and not is_gone(process):
                deadline = time.monotonic() + max(2 * self._period_s, _GOING_S)
                while not is_gone(process) and time.monotonic() < deadline:
                    time.sleep(0.1)  # one that can still run leaves its stacks and goes
                if not is_gone(process):
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)


def last_beat(directory: Path, session: str) -> dict[str, Any] | None:
    """Return the last beat of rank 0 of an earlier attempt."""
    return _read(directory / "ranks" / session / "beat-0")


def _position(beat: dict[str, Any]) -> tuple[int, int]:
    """How far a rank is: all ranks make the same marks and begin the same collectives, in the same order."""
    return beat["marks"], beat["collectives"]


def _read(path: Path) -> dict[str, Any] | None:
    """Return a JSON file, or None if it is not there or being written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
