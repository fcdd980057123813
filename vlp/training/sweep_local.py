"""Runs the cells of a sweep on this machine, one after the other or several at a time, each in its own process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from vlp import config
from vlp.report import cells, sweep_text, words

ROOT = config.CONF.parent
POLL_S = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Job(NamedTuple):
    """A cell as the command line of an ordinary run."""

    name: str
    overrides: tuple[str, ...]
    max_steps: int


class Running(NamedTuple):
    """A cell that runs now."""

    job: Job
    number: int  # from 1, of those that are started
    slot: int
    process: subprocess.Popen
    log: IO[str]
    since: float


class Stops:
    """Counts how often this process was told to stop."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def listening(self) -> Iterator["Stops"]:
        """Count signals inside the block, in place of dying."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.count += 1


def run(directory: Path, jobs: Sequence[Job], *, parallel: int, devices: Sequence[Sequence[str]]) -> None:
    """Run the jobs; a first Ctrl-C lets the running ones save and stop, a second one kills them.

    Args:
        devices: the GPUs of each of the `parallel` places; empty leaves them as they are.
    """
    queue, running, heeded = list(enumerate(jobs, 1))[::-1], list[Running](), 0
    screen = Screen(len(jobs), directory)
    with Stops().listening() as stops:
        while running or (queue and not stops.count):
            while queue and len(running) < parallel and not stops.count:
                number, job = queue.pop()
                slot = min(set(range(parallel)) - {one.slot for one in running})
                running.append(_start(directory, job, number, slot, devices[slot]))
                screen.started(running[-1])
            time.sleep(POLL_S)
            if stops.count > heeded:
                heeded = stops.count
                _stop(running, kill=heeded > 1)
                screen.stopping(len(running), kill=heeded > 1)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _note_exit(directory, one, killed=stops.count > 1)
                screen.ended(one)
            screen.update(running)


def visible_devices(count: int) -> list[str]:
    """Return the names of the GPUs that this process may use, of which there are `count`."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    return stated.split(",") if stated else [str(index) for index in range(count)]


def _start(directory: Path, job: Job, number: int, slot: int, devices: Sequence[str]) -> Running:
    log = (directory / "_logs" / f"{job.name}.log").open("a", encoding="utf-8")
    (directory / "_logs" / f"{job.name}.exit").unlink(missing_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})
    # In a session of its own: a Ctrl-C in the terminal reaches this process only, which then asks each cell once.
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *job.overrides],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return Running(job, number, slot, process, log, time.monotonic())


def _stop(running: Sequence[Running], *, kill: bool) -> None:
    for one in running:
        if one.process.poll() is None:
            if kill:
                os.killpg(one.process.pid, signal.SIGKILL)
            else:
                one.process.send_signal(signal.SIGTERM)


def _note_exit(directory: Path, one: Running, *, killed: bool) -> None:
    one.log.close()
    code = one.process.returncode
    if -code in SIGNALS or (killed and code == -signal.SIGKILL):
        code = cells.CAN_CONTINUE  # told to stop before its first step: that is no failure
    (directory / "_logs" / f"{one.job.name}.exit").write_text(f"{code}\n", encoding="utf-8")


class Screen:
    """One line for each cell that starts or ends; on a terminal also one that says how far the running ones are."""

    def __init__(self, total: int, directory: Path) -> None:
        self.total, self.directory = total, directory
        self.is_live, self.shown, self.asked = sys.stdout.isatty(), "", 0.0

    def started(self, one: Running) -> None:
        """Say that a cell begins."""
        self._line(f"[{one.number}/{self.total}] {one.job.name}")

    def ended(self, one: Running) -> None:
        """Say how a cell ended, how long it took, and its first score."""
        cell = cells.read_cell(self.directory, cells.CellFile(name=one.job.name), [])
        took = words.duration(time.monotonic() - one.since)
        self._line(f"[{one.number}/{self.total}] {one.job.name}: {sweep_text.outcome(cell)} ({took})")

    def stopping(self, number: int, *, kill: bool) -> None:
        """Say what a Ctrl-C does."""
        if not number:
            return
        text = f"killed {words.plural(number, 'running cell')}"
        asked = f"waiting for {words.plural(number, 'running cell')} to save its state; Ctrl-C again kills"
        self._line(text if kill else asked)

    def update(self, running: Sequence[Running]) -> None:
        """Rewrite the last line of a terminal once a second."""
        if not self.is_live or time.monotonic() < self.asked + 1:
            return
        self.asked = time.monotonic()
        parts = []
        for one in running:
            step, loss = cells.progress(self.directory, one.job.name)
            parts.append(f"step {step}/{one.job.max_steps}" + (f", loss {loss:.3f}" if loss is not None else ""))
        text = "  " + " | ".join(parts)
        self._erase()
        self.shown = text[: shutil.get_terminal_size().columns - 1] if running else ""
        print(self.shown, end="", flush=True)

    def _line(self, text: str) -> None:
        self._erase()
        self.shown = ""
        print(text, flush=True)

    def _erase(self) -> None:
        if self.shown:
            print(f"\r{' ' * len(self.shown)}\r", end="")
