"""Reads a sweep's directory: `sweep.json`, and of each cell how it ended and what it scored.

runs/SWEEP/
    sweep.json      the cells and the command          report.html         the page of the sweep
    CELL/           an ordinary run                    _logs/CELL.log      what it printed
    _jobs/          what was handed to SLURM           _logs/CELL.exit     the exit code of its last attempt
"""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vlp.report import words
from vlp.report.panels import newest_by_source
from vlp.report.read import Metrics, read_json, read_metrics, read_run
from vlp.report.records import EMPTY, Evaluation, Row, Run

DONE, RUNNING, STOPPED, FAILED, WAITING = "done", "running", "stopped", "failed", "waiting"
CAN_CONTINUE = 75
MAX_DETAIL = 300  # characters of a log's last line


class CellFile(NamedTuple):
    """One cell of sweep.json."""

    name: str = ""
    group: str = ""
    seed: str | None = None
    changes: Mapping[str, str] = EMPTY
    overrides: tuple[str, ...] = ()


class SweepFile(NamedTuple):
    """sweep.json."""

    name: str = ""
    command: str = ""
    baseline: str = ""  # a group
    keys: Mapping[str, str] = EMPTY  # short key -> full key
    cells: tuple[CellFile, ...] = ()


class Metric(NamedTuple):
    """What identifies a score in every cell."""

    source: str
    task: str
    key: str


class Cell(NamedTuple):
    """One cell as it is now."""

    file: CellFile
    run: Run
    status: str
    reason: str  # why it is not done, in words; "" if it is
    detail: str  # the last line that it printed, where that says more
    scores: Mapping[Metric, Row]
    evaluations: list[Evaluation]
    metrics: Metrics


class SweepFiles(NamedTuple):
    """Everything that the report of a sweep reads."""

    directory: Path
    sweep: SweepFile
    cells: list[Cell]
    problems: list[str]


def read_sweep(directory: Path) -> SweepFiles:
    """Read all cells.

    Raises:
        ValueError: `directory` holds no readable sweep.json.
    """
    problems: list[str] = []
    sweep = read_json(directory / "sweep.json", SweepFile, problems)
    if sweep is None:
        raise ValueError(f"{directory} is no sweep: {'; '.join(problems)}.")
    return SweepFiles(directory, sweep, [read_cell(directory, file, problems) for file in sweep.cells], problems)


def read_cell(directory: Path, file: CellFile, problems: list[str]) -> Cell:
    """Read one cell; what is missing in the directory of one that is done is a problem."""
    status, reason, detail, run = state(directory, file.name)
    place = directory / file.name
    if not (place / "run.json").exists():
        return Cell(file, run, status, reason, detail, {}, [], read_metrics(place / "metrics.csv", []))
    files = read_run(place)
    if status == DONE:
        problems += [f"{file.name}: {text}" for text in files.problems]
    scores = {
        Metric(found.source, name, row.key): row
        for found in newest_by_source(files.evaluations)
        for name, task in found.tasks.items()
        for row in task.rows
        if row.raw is not None
    }
    return Cell(file, run, status, reason, detail, scores if status == DONE else {}, files.evaluations, files.metrics)


def state(directory: Path, name: str) -> tuple[str, str, str, Run]:
    """Return how a cell is doing: status, reason, detail, and its run.json."""
    place, log = directory / name, directory / "_logs" / f"{name}.log"
    found = read_json(place / "run.json", Run, [])
    run = found or Run(name=name)
    where = f"at step {words.count(run.step)} of {words.count(run.max_steps)}"
    if is_locked(place):
        return RUNNING, f"running {where}" if found else "starting", "", run
    code = last_exit(directory, name, run if found else None)
    if code not in (None, 0, CAN_CONTINUE):
        ended = f"{words.ending(code)} (exit {code})"
        return FAILED, f"{ended}, {where}" if found else f"{ended}, before its first step", last_line(log), run
    if found is None:
        return WAITING, "not started" if code is None else "stopped before its first step", "", run
    if run.status == "finished":
        return DONE, "", "", run
    if run.status == "running":  # nobody holds the lock
        return STOPPED, f"ended without a word {where}; it was killed, or its machine went down", last_line(log), run
    return STOPPED, f"stopped {where}, saved", "", run


def last_exit(directory: Path, name: str, run: Run | None) -> int | None:
    """Return the exit code of the newest attempt: who started it noted it, and mostly run.json has it too."""
    path, record = directory / "_logs" / f"{name}.exit", directory / name / "run.json"
    try:
        noted, newer = int(path.read_text(encoding="utf-8")), path.stat().st_mtime
        if run is None or run.exit_code is None or newer >= record.stat().st_mtime:
            return noted
    except (OSError, ValueError):
        return run.exit_code if run is not None else None
    return run.exit_code


def is_locked(place: Path) -> bool:
    """Tell whether a process owns a run directory."""
    try:
        with (place / "run.lock").open("r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def last_line(log: Path) -> str:
    """Return the last line of a log that is not a progress bar, shortened."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    noise = ("train:", "job ", "srun: ", "slurmstepd", "exit code ", "Report: ")
    said = [line for line in lines if line and not line.startswith(noise) and ". Run directory: " not in line]
    return said[-1][:MAX_DETAIL] if said else ""


def progress(directory: Path, name: str) -> tuple[int, float | None]:
    """Return the last logged step of a cell and its loss; cheap enough to ask every second."""
    metrics = directory / name / "metrics.csv"
    try:
        with metrics.open(encoding="utf-8", errors="replace") as file:
            header = file.readline().rstrip("\n").split(",")
            file.seek(max(file.tell(), metrics.stat().st_size - 4096))
            row = dict(zip(header, file.read().rpartition("\n")[0].rpartition("\n")[2].split(","), strict=True))
        return int(row["step"]), float(row["train/loss"]) if row.get("train/loss") else None
    except (OSError, ValueError, KeyError):
        return 0, None


def write_sweep(directory: Path, sweep: SweepFile) -> None:
    """Write sweep.json as a whole; the directory exists."""
    content = sweep._asdict() | {"cells": [cell._asdict() for cell in sweep.cells]}
    temporary = directory / ".sweep.json.new"
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(directory / "sweep.json")
