"""Preempt a run, again and again, at random moments, by a job of higher priority on a real SLURM.

    python tests/slurm_preemptions.py 20        # preemptions; a seed may follow

The run is warned (USR1), saves, leaves with 75 and is queued again by its batch script, or dies before it has listened
and is queued again for that. Counted are the steps that it had logged and whose work was lost, and at the end the steps
that its metrics miss or have twice.
"""

import csv
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from slurm_cluster import Cluster, cluster
from tiny_runs import overrides

ENDLESS = 100_000
STARTUP_S = 12.0  # of a run on a quiet machine; preemptions come at any moment of the start and of the steps after it


class Count(NamedTuple):
    """What the preemptions did."""

    preemptions: int
    steps: int  # of the run at its end
    lost: int  # steps that were logged and not saved, over all preemptions
    missing: int  # steps that the metrics lack or have twice
    restarts: int  # as SLURM counts them, in run.json
    during_start: int  # preemptions before the first step of an attempt


def run(place: Path, *, preemptions: int, seed: int, startup_s: float = STARTUP_S) -> Count:
    """Preempt one run and let it end."""
    draw, runs = random.Random(seed), place / "runs" / "preempted"
    with cluster(place / "slurm") as found:
        found.environment["VLP_PYTHON"] = sys.executable
        job = _submit(found, place)
        lost = early = 0
        for number in range(preemptions):
            _until_runs(found, job)
            before = _last_step(runs)
            if number % 4 < 3:  # most of them among the steps
                found.wait(lambda before=before: _last_step(runs) > before)
                time.sleep(draw.uniform(0, 0.5))
            else:
                time.sleep(draw.uniform(0, startup_s))
            _preempt(found, job)
            logged, saved = _last_step(runs), _saved(runs)
            lost += max(0, logged - saved)
            early += logged == before
        _until_runs(found, job)
        steps = _end(found, job, runs)
    listed = [int(float(row["step"])) for row in _rows(runs) if row.get("train/loss")]
    restarts = json.loads((runs / "run.json").read_text())["slurm"]["restarts"]
    return Count(preemptions, steps, lost, _wrong(listed, steps), restarts, early)


def _submit(found: Cluster, place: Path) -> str:
    words = overrides(place, "preempted", "objective=[contrastive]", f"trainer.max_steps={ENDLESS}")
    words += [f"trainer.checkpoint_every={ENDLESS}", "run.stop_after=null", "eval.tasks={}"]
    return found.submit("--partition=low", f"--output={place}/job.log", "scripts/slurm/run.sbatch", *words)


def _until_runs(found: Cluster, job: str) -> None:
    found.wait(lambda: found.job(job).get("JobState") == "RUNNING")


def _preempt(found: Cluster, job: str) -> None:
    restarts = int(found.job(job)["Restarts"])
    urgent = found.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    found.wait(lambda: int(found.job(job).get("Restarts", "0")) > restarts)
    found.wait(lambda: found.job(urgent).get("JobState") == "COMPLETED")


def _end(found: Cluster, job: str, runs: Path) -> int:
    """Let it do a few more steps, and stop it for good."""
    before = _last_step(runs)
    found.wait(lambda: _last_step(runs) > before + 2)
    found.command("scancel", job)
    found.wait(found.is_empty)
    return _saved(runs)


def _rows(runs: Path) -> list[dict[str, str]]:
    path = runs / "metrics.csv"
    if not path.exists():
        return []
    text = path.read_bytes().decode()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _last_step(runs: Path) -> int:
    rows = _rows(runs)
    return int(float(rows[-1]["step"])) if rows else 0


def _saved(runs: Path) -> int:
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in (runs / "checkpoints").glob("step-*")]
    return max((int(match[1]) for match in found if match), default=0)


def _wrong(listed: list[int], steps: int) -> int:
    wanted = set(range(1, steps + 1))
    return len(wanted - set(listed)) + len(listed) - len(set(listed) & wanted)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(run(Path(folder), preemptions=int(sys.argv[1]), seed=seed))
