"""Hands the cells of a sweep to SLURM as one job array, and follows it.

Plain `sbatch` with `scripts/slurm/array.sbatch`, which also works by hand: what a job runs is a file of overrides that
anybody can read, not an object that a job unpickles. Whether a cell is queued again is decided in the job.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlp import config, sweep
from vlp.report import cells, sweep_text
from vlp.training.sweep_local import ROOT, Job, Stops

SCRIPT = ROOT / "scripts" / "slurm" / "array.sbatch"
VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@,&|*\[\]()-]{0,127}")  # what a name of the cluster may look like
LIVE_S = 600.0  # seconds for which squeue may fail before following ends


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What each cell asks for; conf/hydra/launcher/slurm.yaml explains the values."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    mem_gb: int | None
    timeout_min: int
    signal_delay_s: int
    array_parallelism: int
    dry_run: bool
    wait: bool
    poll_s: float


class Element(NamedTuple):
    """One element of a submitted array."""

    job: str  # ARRAY_NUMBER
    cell: str


def launcher(asked: sweep.Sweep, conf: Path = config.CONF) -> Slurm | None:
    """Return what `hydra/launcher` names; None for this machine.

    Raises:
        config.ConfigError: there is no such launcher, or it has not such values.
    """
    known = {path.stem: path for path in sorted((conf / "hydra" / "launcher").glob("*.yaml"))}
    if asked.launcher not in known:
        raise config.ConfigError([f"hydra/launcher: there is no '{asked.launcher}'; there are {', '.join(known)}."])
    values = yaml.safe_load(known[asked.launcher].read_text(encoding="utf-8"))
    typed = {key: yaml.safe_load(text) if text else None for key, text in asked.launcher_values.items()}
    if values.pop("kind", None) == "local":
        if typed:
            raise config.ConfigError([f"hydra.launcher.{key}: the local launcher has no such value." for key in typed])
        return None
    if asked.parallel != 1:
        raise config.ConfigError(["sweep.parallel: is for this machine; use hydra.launcher.array_parallelism=N."])
    return _checked(values | typed, asked.launcher)


def _checked(values: Mapping[str, Any], name: str) -> Slurm:
    hints = {field.name: getattr(field.type, "__name__", str(field.type)) for field in dataclasses.fields(Slurm)}
    messages = [
        f"hydra.launcher.{key}: unknown key; known: {', '.join(hints)}." for key in values.keys() - hints.keys()
    ]
    messages += [f"hydra.launcher.{key}: is missing in launcher '{name}'." for key in hints.keys() - values.keys()]
    for key in hints.keys() & values.keys():
        reason = _refused(values[key], hints[key], least=0 if key == "gpus_per_node" else 1)
        if reason:
            messages.append(f"hydra.launcher.{key}: {values[key]!r} is not possible; it must be {reason}.")
    if messages:
        raise config.ConfigError(sorted(messages))
    return Slurm(**values)


def _refused(value: Any, hint: str, *, least: int) -> str:
    """Return what a value should have been; "" if it is that."""
    kind, _, optional = hint.partition(" | ")
    if value is None and optional:
        return ""
    if kind == "str":
        return "" if isinstance(value, str) and VALUE.fullmatch(value) else "a name as SLURM has them"
    if kind == "bool":
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
        return "a number"
    return "" if value >= least or (kind == "float" and value > 0) else f"at least {least}"


def sbatch_command(settings: Slurm, folder: Path, name: str, count: int) -> list[str]:
    """Return the command that submits the elements 0 to `count` - 1 of a prepared folder."""
    options = {
        "array": f"0-{count - 1}%{settings.array_parallelism}",
        "job-name": name,
        "chdir": str(Path.cwd()),
        "output": f"{str(folder.parent.parent.resolve()).replace('%', '%%')}/_logs/slurm-%A_%a.log",
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "nodes": settings.nodes,
        "ntasks-per-node": settings.tasks_per_node,
        "gpus-per-node": settings.gpus_per_node or None,
        "cpus-per-task": settings.cpus_per_task,
        "mem": f"{settings.mem_gb}G" if settings.mem_gb else None,
        "time": settings.timeout_min,
        "signal": f"USR1@{settings.signal_delay_s}",
    }
    words = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *words, str(SCRIPT), str(folder.resolve())]


def run(directory: Path, jobs: Sequence[Job], settings: Slurm) -> None:
    """Submit the cells that are not in the queue yet, and follow them until they have left it.

    Raises:
        config.ConfigError: there is no SLURM here, or it refuses the job.
    """
    if shutil.which("sbatch") is None and not settings.dry_run:
        raise config.ConfigError(["hydra/launcher=slurm: there is no sbatch on this machine; log in to the cluster."])
    queued = {element.cell: element.job for element in elements(directory)} if not settings.dry_run else {}
    live = {cell: job for cell, job in queued.items() if job in states()} if queued else {}
    new = [job for job in jobs if job.name not in live]
    for cell, job in live.items():
        print(f"{cell}: already in the queue as job {job}")
    if new:
        folder = prepare(directory, new)
        command = sbatch_command(settings, folder, directory.name, len(new))
        if settings.dry_run:
            print(f"Prepared {folder}. To submit it:\n  {' '.join(sweep_text.shell(word) for word in command)}")
            return
        array = _submit(command, folder)
        print(f"Submitted job array {array}: {len(new)} cells. Cancel it with: scancel {array}", flush=True)
    if settings.wait:
        follow(directory, [job.name for job in jobs], settings.poll_s)


def prepare(directory: Path, jobs: Sequence[Job]) -> Path:
    """Write what each element of an array runs, and return the folder."""
    taken = [int(path.name) for path in (directory / "_jobs").iterdir() if path.name.isdigit()]
    folder = directory / "_jobs" / f"{max(taken, default=0) + 1:03d}"
    folder.mkdir()
    for number, job in enumerate(jobs):
        (folder / f"{number}.args").write_text("".join(f"{word}\n" for word in job.overrides), encoding="utf-8")
        (folder / f"{number}.cell").write_text(f"{job.name}\n", encoding="utf-8")
    return folder


def _submit(command: Sequence[str], folder: Path) -> str:
    environment = os.environ | {"VLP_PYTHON": sys.executable, "VLP_ROOT": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise config.ConfigError([f"hydra/launcher=slurm: {' '.join(done.stderr.split()) or 'sbatch failed'}"])
    array = done.stdout.strip().partition(";")[0]
    (folder / "job").write_text(f"{array}\n", encoding="utf-8")
    return array


def elements(directory: Path) -> Iterator[Element]:
    """Yield every element that was ever submitted for a sweep, oldest first."""
    for path in sorted((directory / "_jobs").glob("*/job")):
        array = path.read_text(encoding="utf-8").strip()
        for cell in path.parent.glob("*.cell"):
            yield Element(f"{array}_{cell.stem}", cell.read_text(encoding="utf-8").strip())


def states() -> dict[str, str]:
    """Return the jobs of this user that are queued or run: ARRAY_NUMBER -> state and reason.

    Raises:
        OSError: squeue does not answer.
    """
    done = subprocess.run(
        ["squeue", "--me", "--array", "--noheader", "--format=%i %T %r"], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise OSError(done.stderr.strip())
    rows = (line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip())
    return {job: state.lower() + (f" ({why})" if why != "None" else "") for job, state, why in rows}


def follow(directory: Path, names: Sequence[str], poll_s: float) -> None:
    """Print each change of state until no cell is in the queue; Ctrl-C stops following, not the jobs."""
    shown: dict[str, str] = {}
    answered = time.monotonic()
    with Stops().listening() as stops:
        while not stops.count:
            try:
                live, answered = states(), time.monotonic()
            except (OSError, subprocess.TimeoutExpired) as error:
                if time.monotonic() > answered + LIVE_S:
                    print(f"squeue does not answer ({error}); the jobs go on without being followed.")
                    return
                time.sleep(poll_s)
                continue
            job_of = {element.cell: element.job for element in elements(directory)}
            for name in names:
                _show(directory, name, live.get(job_of.get(name, ""), ""), shown)
            if not any(job_of.get(name) in live for name in names):
                return
            _sleep(poll_s, stops)
    print("Not followed any more; the jobs go on. The same command follows them again.")


def _show(directory: Path, name: str, state: str, shown: dict[str, str]) -> None:
    if not state and name in shown and shown[name] != "ended":
        cell = cells.read_cell(directory, cells.CellFile(name=name), [])
        print(f"{name}: {sweep_text.outcome(cell)}", flush=True)
        shown[name] = "ended"
    elif state and shown.get(name) != state:
        print(f"{name}: {state}", flush=True)
        shown[name] = state


def _sleep(seconds: float, stops: Stops) -> None:
    end = time.monotonic() + seconds
    while not stops.count and time.monotonic() < end:
        time.sleep(0.1)
