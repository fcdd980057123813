"""Runs a sweep: checks every cell first, starts those that are not done, and ends with a table and a page.

A cell is an ordinary run in `runs/SWEEP/CELL`, started as `python train.py ...` in a process of its own: a process that
starts others (data parallelism) then starts them for its own cell, and one that dies takes no other cell with it.
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from vlp import config, sweep
from vlp.report import cells, sweep_text
from vlp.report.sweep import write_page_of
from vlp.training import run_dir, sweep_local, sweep_slurm
from vlp.training.assemble import assemble, plain
from vlp.training.exits import Exit, StopRun, reported
from vlp.training.sweep_local import Job

SHOWN = 3  # names of cells in a message


class Checked(NamedTuple):
    """A sweep whose cells can all run."""

    directory: Path
    jobs: list[Job]
    record: cells.SweepFile


def run(words: Sequence[str]) -> int:
    """Run the sweep of a command line; return the exit code.

    Raises:
        config.ConfigError: findings in any cell; nothing was started then.
        StopRun: the directory of the sweep cannot be used.
    """
    asked = sweep.parse(words)
    launcher = sweep_slurm.launcher(asked)
    checked = check(asked, shlex.join(["python", "train.py", *words]))
    create(checked)
    started = [cell.name for cell in asked.cells if asked.only is None or asked.only in cell.name]
    waiting = [job for job in checked.jobs if job.name in started and not is_done(checked.directory, job)]
    print(sweep_text.opening(checked.record.name, checked.directory, len(started), len(waiting)), flush=True)
    if waiting and launcher is None:
        sweep_local.run(checked.directory, waiting, parallel=asked.parallel, devices=_devices(asked, waiting))
    elif waiting and launcher is not None:
        sweep_slurm.run(checked.directory, waiting, launcher)
    files = cells.read_sweep(checked.directory)
    print(sweep_text.text(files, write_page_of(files)))
    return exit_code(files, started)


def is_done(directory: Path, job: Job) -> bool:
    """Tell whether a cell has reached its last step, which a new command may have moved."""
    status, _, _, record = cells.state(directory, job.name)
    return status == cells.DONE and record.step >= job.max_steps


def exit_code(files: cells.SweepFiles, names: Sequence[str]) -> int:
    """Return 0 if all these cells are done, the code of the first that failed, or 75: the same command goes on."""
    found = [cell for cell in files.cells if cell.file.name in names]
    for cell in found:
        if cell.status == cells.FAILED:
            return max(cells.last_exit(files.directory, cell.file.name, cell.run) or 0, 0) or Exit.BUG
    return Exit.DONE if all(cell.status == cells.DONE for cell in found) else Exit.PREEMPTED


def check(asked: sweep.Sweep, command: str) -> Checked:
    """Compose and check the config of every cell, and what lies in its directory.

    Raises:
        config.ConfigError: all findings, each once, with the cells that it concerns.
    """
    findings: dict[str, list[str]] = {}
    configs: dict[str, DictConfig] = {}
    assembled: dict[str, list[str]] = {}
    for cell in asked.cells:
        cfg, messages = _config_of(cell.overrides)
        messages += _wiring_errors(cfg, assembled) if cfg is not None and not messages else []
        for message in messages:
            findings.setdefault(message, []).append(cell.name)
        if cfg is not None:
            configs[cell.name] = cfg
    messages = [_say(message, names, len(asked.cells)) for message, names in findings.items()]
    groups = list(dict.fromkeys(cell.group for cell in asked.cells))
    baseline = asked.baseline or groups[0]
    if baseline not in groups:
        messages.append(f"sweep.baseline: there is no cell '{baseline}'; there are {', '.join(groups)}.")
    if asked.only is not None and not any(asked.only in cell.name for cell in asked.cells):
        messages.append(f"sweep.only: no cell has '{asked.only}' in its name.")
    if messages:
        raise config.ConfigError(messages)
    first = configs[asked.cells[0].name]
    directory = Path(first.paths.runs) / (asked.name or f"{first.run.name}-by-{asked.by}"[:120])
    _refuse_taken(directory)
    jobs = [_job(directory, cell, configs[cell.name]) for cell in asked.cells]
    _refuse_other_configs(directory, jobs)
    files = tuple(cells.CellFile(c.name, c.group, c.seed, c.changes, c.overrides) for c in asked.cells)
    return Checked(directory, jobs, cells.SweepFile(directory.name, command, baseline, asked.keys, files))


def create(checked: Checked) -> None:
    """Make the directory of the sweep and its record; cells of an earlier command that this one lacks stay listed.

    Raises:
        StopRun: it cannot be written (exit 73).
    """
    directory, record = checked.directory, checked.record
    run_dir.create(directory)
    for name in ("_logs", "_jobs"):
        (directory / name).mkdir(exist_ok=True)
    if (directory / "sweep.json").exists():
        with contextlib.suppress(ValueError):  # a damaged record of an earlier command is written anew
            earlier, names = cells.read_sweep(directory).sweep, {cell.name for cell in record.cells}
            kept = tuple(cell for cell in earlier.cells if cell.name not in names and (directory / cell.name).is_dir())
            record = record._replace(cells=record.cells + kept, keys={**earlier.keys, **record.keys})
    cells.write_sweep(directory, record)


def _config_of(overrides: Sequence[str]) -> tuple[DictConfig | None, list[str]]:
    try:
        return config.load(overrides), []
    except config.ConfigError as error:
        return None, list(error.messages)


def _wiring_errors(cfg: DictConfig, known: dict[str, list[str]]) -> list[str]:
    """Assemble the model without memory for it; once for all cells that differ in numbers outside it only."""
    objectives = {name: {**plain(node), "weight": 0} for name, node in cfg.objective.items() if node is not None}
    key = json.dumps([plain(cfg.model), objectives, plain(cfg.view)], sort_keys=True, default=str)
    if key not in known:
        known[key] = []
        try:
            with torch.device("meta"):
                assemble(cfg)
        except config.ConfigError as error:
            known[key] = list(error.messages)
    return known[key]


def _say(message: str, names: Sequence[str], total: int) -> str:
    """Return a finding with the cells that it concerns, unless it concerns all."""
    if len(names) == total:
        return message
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{message} (in {', '.join(names[:SHOWN])}{more})"


def _job(directory: Path, cell: sweep.Cell, cfg: DictConfig) -> Job:
    own = [f"paths.runs={sweep.quoted(str(directory))}", f"run.name={sweep.quoted(cell.name)}"]
    if "wandb" in cfg.logger:  # the default id is the run's name, which other sweeps may use too
        own += [f"logger.wandb.id={sweep.quoted(f'{directory.name}.{cell.name}'[-120:])}"]
        own += [f"logger.wandb.name={sweep.quoted(cell.name)}", f"logger.wandb.group={sweep.quoted(directory.name)}"]
    return Job(cell.name, (*cell.overrides, *own), cfg.trainer.max_steps)


def _refuse_taken(directory: Path) -> None:
    if (directory / "run.json").exists():
        message = f"{directory} is a run, not a sweep; choose another run.name."
        raise StopRun(Exit.CANNOT_CREATE, message)


def _refuse_other_configs(directory: Path, jobs: Sequence[Job]) -> None:
    """Find cells that were started with another config before anything runs.

    Raises:
        StopRun: at least one was (exit 76); all are listed.
    """
    lines = []
    for job in jobs:
        if (directory / job.name / "config.yaml").exists():
            try:
                run_dir.refuse_other_config(directory / job.name, plain(config.load(job.overrides)))
            except StopRun as stop:
                lines.append(stop.message)
    if lines:
        raise StopRun(Exit.RESUME_REFUSED, "\n".join(dict.fromkeys(lines)))


def _devices(asked: sweep.Sweep, waiting: Sequence[Job]) -> list[list[str]]:
    """Return the GPUs of each of the cells that run side by side; empty lists where they need not be told apart."""
    count = torch.cuda.device_count()
    if asked.parallel == 1 or not count:
        return [[] for _ in range(asked.parallel)]
    visible = sweep_local.visible_devices(count)
    share = len(visible) // asked.parallel
    if not share:
        raise config.ConfigError(
            [f"sweep.parallel: {asked.parallel} cells cannot share {len(visible)} GPUs; use at most {len(visible)}."]
        )
    return [visible[slot * share : (slot + 1) * share] for slot in range(asked.parallel)]


def main(words: Sequence[str]) -> int:
    """Run the sweep and print the mistakes; for `launch.main`."""

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return reported(lambda: run(words))
