"""P10: warm time from the command to the end of the first step, against a hand-written script with the same imports."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlp.data.synthetic import World

ROOT = Path(__file__).parents[2]
NUM_PAIRS = 5
WORLD = {"num_train": 128, "num_test": 8, "size": 96, "num_frames": 16, "fps": 8.0}


def main() -> dict[str, Any]:
    """Return the medians in seconds and their ratio."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(root=f"{directory}/data/world", **WORLD)
        world.prepare()
        shard = world.shards("train")[0]
        _ours(directory, "warm_up"), _by_hand(shard)  # caches of files and of compiled Python
        pairs = [(_ours(directory, f"run{n}"), _by_hand(shard)) for n in range(NUM_PAIRS)]
    ratios = [ours / by_hand for ours, by_hand in pairs]
    return {
        "vlp s to the first step": statistics.median(ours for ours, _ in pairs),
        "hand-written s to the first step": statistics.median(by_hand for _, by_hand in pairs),
        "ratio": statistics.median(ratios),
        "ratio, lowest and highest": f"{min(ratios):.2f} to {max(ratios):.2f}",
    }


def _ours(directory: str, name: str) -> float:
    """Seconds until the first step stands in metrics.csv."""
    places = [f"paths.runs={directory}/runs", f"paths.data={directory}/data", f"run.name={name}"]
    world = [f"data.sources.world.{key}={value}" for key, value in WORLD.items()]
    command = [sys.executable, "train.py", "+experiment=quickstart", "objective=[contrastive]", *places, *world]
    table = Path(directory) / "runs" / name / "metrics.csv"
    return _seconds(command, until=lambda: table.exists() and table.read_text(encoding="utf-8").count("\n") > 1)


def _by_hand(shard: str) -> float:
    """Seconds until the script has done its step."""
    return _seconds([sys.executable, "scripts/bench/startup_by_hand.py", shard], until=lambda: False)


def _seconds(command: list[str], until: Any) -> float:
    started = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, **quiet) as process:
        while process.poll() is None and not until():
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.terminate()
    return seconds


if __name__ == "__main__":
    print(main())
