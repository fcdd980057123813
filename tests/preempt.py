"""Warn a run at any moment, as a scheduler does before it takes the machine away: how many steps are lost?

    python tests/preempt.py 20 --seed 1          # warned preemptions

Each attempt is told by USR1, TERM or INT, at a drawn time from its first instruction to its last: while it starts,
loads, trains, evaluates or saves; one rank, all ranks, or all ranks with their loader workers; once or twice. The next
attempt has another number of ranks or workers. In the end the ledger must be that of a run that nobody disturbed.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from exact_resume import committed, whole
from forked_ranks import Session, changed, start, toy, wait

from vlp.training import ledger
from vlp.training.exits import Exit

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
EVALUATED = ("eval.every=2", "eval.tasks.retrieval._target_=vlp.eval.retrieval.Retrieval", "eval.batch_size=2")


class Count(NamedTuple):
    """What the preemptions did."""

    preemptions: int  # attempts that ended because they were warned
    lost: int  # steps that were done and not committed
    codes: dict[int, int]  # exit code -> ranks that ended with it
    early: int  # of them, before their first step
    different: int  # rows of the ledger whose ids or losses differ from the undisturbed run
    finished: bool


def run(place: Path, *, preemptions: int, seed: int, worlds: tuple[int, ...] = (1, 2)) -> Count:
    """Preempt one run so often and let it end; every attempt commits only when it is told to."""
    draw, codes, lost, early = random.Random(seed), {}, 0, 0
    steps = 6 * preemptions
    cfg = toy(place, "x", f"trainer.max_steps={steps}", *EVALUATED, "text.config.hidden_dropout_prob=0.0")
    whole(place, cfg, "whole", world=1)
    cfg, run_dir, log = (
        changed(cfg, run__name="broken", trainer__checkpoint_every=steps),
        place / "runs/broken",
        place / "l",
    )
    usual_s = 3.0
    preempted = 0
    while committed(run_dir) < steps:
        world, begin = draw.choice(worlds), len(_rows(run_dir))
        values = {"data__num_workers": draw.randint(0, 2)}
        ranks, began = start(changed(cfg, **values), log=log, session=Session(world)), time.monotonic()
        if preempted < preemptions:
            _warn(ranks, draw, usual_s, lambda begin=begin: len(_rows(run_dir)) - begin)
        ended = wait(ranks, patience_s=120)
        for code in ended:
            codes[code] = codes.get(code, 0) + 1
        if set(ended) - {Exit.DONE, Exit.PREEMPTED}:
            break
        preempted += Exit.PREEMPTED in ended
        usual_s = 0.7 * usual_s + 0.3 * (time.monotonic() - began)
        rows = _rows(run_dir)
        early += Exit.PREEMPTED in ended and len(rows) == begin
        lost += rows[-1]["step"] - committed(run_dir) if rows else 0
    return Count(preempted, lost, codes, early, _different(place), committed(run_dir) == steps)


def _warn(ranks: list[BaseProcess], draw: random.Random, usual_s: float, num_steps: Callable[[], int]) -> None:
    """Signal at any time of the start, or, twice as often, in the first steps."""
    if draw.random() < 2 / 3:
        wanted = draw.randint(1, 3)
        while num_steps() < wanted and ranks[0].is_alive():
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.2))
    else:
        time.sleep(draw.uniform(0.0, usual_s))
    number, times = draw.choice(SIGNALS), draw.choice((1, 1, 2))
    pids = [rank.pid for rank in ranks if rank.pid]
    chosen = pids if draw.random() < 0.6 else [draw.choice(pids)]
    send = os.killpg if draw.random() < 0.5 else os.kill  # a rank leads the group of its workers
    for _ in range(times):
        for pid in chosen:
            try:
                send(pid, number)
            except ProcessLookupError:
                return  # the run was faster
        time.sleep(draw.uniform(0.0, 0.3))


def _rows(run_dir: Path) -> list[dict]:
    return [row for row in ledger.read(run_dir / "ledger.jsonl") if "step" in row]


def _different(place: Path) -> int:
    """Compare ids exactly and losses within 1e-4: the number of ranks changes, and Adam amplifies the last bits."""
    expected = {row["step"]: row for row in _rows(place / "runs/whole")}
    rows = _rows(place / "runs/broken")
    other = sum(
        row["ids"] != expected[row["step"]]["ids"]
        or abs(float.fromhex(row["loss"]) - float.fromhex(expected[row["step"]]["loss"])) > 1e-4
        for row in rows
    )
    return other + len(expected.keys() ^ {row["step"] for row in rows}) + len(rows) - len(expected)


def main() -> None:
    """Print the count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("preemptions", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(run(Path(place), preemptions=given.preemptions, seed=given.seed, worlds=tuple(given.world)))
        names = {int(code): code.name for code in Exit}
        print("exit codes:", ", ".join(f"{code} = {name}" for code, name in names.items() if code in (0, 75)))


if __name__ == "__main__":
    main()
