"""P10: seconds from the command to the end of the first step, warm, against a hand-written script.

The script imports the same libraries, builds the same modules from the same classes, opens the same shards and does one
step; it has no config, no checks, no run directory, no report.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NUM_PAIRS = 5


def main() -> dict[str, Any]:
    """Return the medians in seconds and their ratio."""
    ours, by_hand = [], []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(NUM_PAIRS + 1):
            a, b = _framework(Path(directory), f"run{number}"), _hand_written()
            if number:  # the first pair warms the caches of files and shards
                ours.append(a)
                by_hand.append(b)
    return {
        "vlp seconds": statistics.median(ours),
        "hand-written seconds": statistics.median(by_hand),
        "ratio": statistics.median(a / b for a, b in zip(ours, by_hand, strict=True)),
    }


def _framework(runs: Path, name: str) -> float:
    """The row of the first step in metrics.csv is written when that step is done."""
    overrides = ["+experiment=quickstart", f"run.name={name}", f"paths.runs={runs}", "trainer.max_steps=1"]
    started = time.time()
    command = [sys.executable, "train.py", *overrides, "trainer.progress_bar=false", "objective=[contrastive]"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return (runs / name / "first_step").stat().st_mtime - started


def _hand_written() -> float:
    started = time.time()
    script = [sys.executable, str(Path(__file__).with_name("first_step_by_hand.py"))]
    done = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1]) - started
