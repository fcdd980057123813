"""P11: how long a save holds training up; and P9: restoring, and the time from the command to the first new step.

The state is that of a model under AdamW in float32: weights and two moments. Every way of saving takes the same tensors
in turns, on the same disk; torch.save and torch's distributed checkpoint (DCP) are used as their manuals say, without
the fsync and the digests that vlp adds. Restoring reads from the page cache, verifies every digest, and copies into
tensors that exist; a mapped read copies the same bytes by `safetensors.torch.load_file` and verifies nothing.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from startup import WORLD, _seconds
from torch import Tensor

from vlp.data.synthetic import World
from vlp.training import checkpoint
from vlp.training.checkpoint import State
from vlp.training.metrics_csv import read
from vlp.training.saver import Saver

NUM_PARAMETERS = int(os.environ.get("BENCH_PARAMETERS", 64_000_000))
NUM_TURNS = int(os.environ.get("BENCH_TURNS", 7))


def main() -> dict[str, Any]:
    """Return medians in seconds, and their ratios."""
    with tempfile.TemporaryDirectory() as directory:
        return {**stall(Path(directory)), **restore(Path(directory)), **first_new_step(Path(directory))}


def tensors() -> dict[str, Tensor]:
    """Return weights and moments in layers of one million parameters and some small ones."""
    side, count = 1000, NUM_PARAMETERS // 1_000_000
    shapes = {f"layers.{n}.weight": (side, side) for n in range(count)}
    shapes |= {f"layers.{n}.bias": (side,) for n in range(count)}
    kinds = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    return {f"{kind}/{name}": torch.randn(shape) for kind in kinds for name, shape in shapes.items()}


def stall(directory: Path) -> dict[str, Any]:
    """Measure what a training loop waits for, in turns."""
    state = State(tensors(), {"cursor": 1})
    savers = {
        name: Saver(directory / name, keep=2, background=background)
        for name, background in (("sync", False), ("async", True))
    }
    ways: dict[str, Callable[[int], None]] = {
        "vlp, asynchronous": lambda turn: savers["async"].save(turn, state, then=lambda: None),
        "vlp, synchronous": lambda turn: savers["sync"].save(turn, state, then=lambda: None),
        "torch.save": lambda turn: torch.save(state.tensors, directory / f"torch{turn % 2}"),
        "DCP": lambda turn: dcp.save(dict(state.tensors), checkpoint_id=directory / f"dcp{turn % 2}", no_dist=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(NUM_TURNS + 1):
        for name, save in ways.items():
            os.sync()  # nobody pays for the bytes of the one before
            seconds[name].append(_time(lambda save=save, turn=turn: save(turn)))
            savers["async"].settle()
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first one makes the buffers
    slowest = max(seconds["vlp, asynchronous"][1:])
    sync = medians["vlp, synchronous"]
    return {
        "state": f"{sum(t.nbytes for t in state.tensors.values()) / 2**20:.0f} MiB in {len(state.tensors)} tensors",
        **{f"s that training stands still, {name}": value for name, value in medians.items()},
        "stall, asynchronous to synchronous": medians["vlp, asynchronous"] / sync,
        "stall, slowest asynchronous to synchronous": slowest / sync,
        "stall, asynchronous to torch.save": medians["vlp, asynchronous"] / medians["torch.save"],
        "stall, asynchronous to DCP": medians["vlp, asynchronous"] / medians["DCP"],
        "synchronous to torch.save": sync / medians["torch.save"],
        "synchronous to DCP": sync / medians["DCP"],
        "a step while a save is written, to one before": _slow_down(savers["async"], state),
    }


def _slow_down(saver: Saver, state: State) -> float:
    """Return how much slower a step that uses all cores is while a thread writes."""
    x = torch.randn(1500, 1500)
    before = [_time(lambda: x @ x @ x) for _ in range(20)]
    saver.save(100, state, then=lambda: None)
    during = []
    while saver.is_busy:
        during.append(_time(lambda: x @ x @ x))
    saver.settle()
    return statistics.mean(during) / statistics.mean(before)


def restore(directory: Path) -> dict[str, Any]:
    """Measure the way from the files to tensors that exist."""
    into, root = tensors(), directory / "sync"
    (file,) = checkpoint.all_steps(root)[-1].glob("*.safetensors")
    torch.save(into, directory / "torch0")

    def ours() -> None:
        stored, _ = checkpoint.newest_valid(root)
        assert stored is not None
        for key, tensor in into.items():
            tensor.copy_(stored.get(key))

    def mapped() -> None:
        for key, tensor in load_file(file).items():
            into[key].copy_(tensor)

    def loaded() -> None:
        for key, tensor in torch.load(directory / "torch0", weights_only=True).items():
            into[key].copy_(tensor)

    pairs = [(_time(ours), _time(mapped), _time(loaded)) for _ in range(NUM_TURNS)]
    own, other, third = (statistics.median(column) for column in zip(*pairs, strict=True))
    size = file.stat().st_size / 2**30
    return {
        "restore with all digests verified, GiB/s": size / own,
        "mapped read, GiB/s": size / other,
        "torch.load, GiB/s": size / third,
        "speed, restore to mapped read": other / own,
        "speed, restore to torch.load": third / own,
    }


def first_new_step(directory: Path) -> dict[str, Any]:
    """Measure from the command to the next row of metrics.csv, continued and from the start."""
    world = World(root=f"{directory}/data/world", **WORLD)
    world.prepare()
    _command(directory, "warm", "run.stop_after=1")
    continued, fresh = [], []
    for turn in range(3):
        fresh.append(_command(directory, f"run{turn}", "run.stop_after=1"))
        continued.append(_command(directory, f"run{turn}"))
    return {
        "s from the command to the first new step, continued": statistics.median(continued),
        "s from the command to the first step, fresh": statistics.median(fresh),
        "continued to fresh": statistics.median(a / b for a, b in zip(continued, fresh, strict=True)),
    }


def _command(directory: Path, name: str, *more: str) -> float:
    """Run train.py until it has written one more row, or to its end if it is told to stop; return the seconds to it."""
    places = [f"paths.runs={directory}/runs", f"paths.data={directory}/data", f"run.name={name}"]
    world = [f"data.sources.world.{key}={value}" for key, value in WORLD.items()]
    settings = ["objective=[contrastive]", "trainer.log_every=1", "eval.tasks={}"]
    command = [sys.executable, "train.py", "+experiment=quickstart", *settings, *places, *world, *more]
    table = directory / "runs" / name / "metrics.csv"
    rows = _rows(table)
    began, found = time.perf_counter(), []

    def seen() -> bool:
        if not found and _rows(table) > rows:
            found.append(time.perf_counter() - began)
        return bool(found) and not more  # one that stops by itself must come to its checkpoint

    _seconds(command, until=seen)
    return found[0]


def _rows(table: Path) -> int:
    """Return the number of steps in the table."""
    return sum("train/loss" in row for row in read(table))


def _time(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(main())
