"""Is a run that was broken off and continued the same as one that was not? Compared by its ledger, to the last bit.

    python tests/exact_resume.py                 # the whole table, 1 to 4 ranks: an hour on two idle cores
    python tests/exact_resume.py --world 3 --kind kill --steps 10 --seed 1

A run is struck in every step, in turn: by SIGKILL, by SIGUSR1, by an exception, each on a drawn rank at a drawn place
of the step, with a drawn number of loader workers. What it has committed is continued by the next attempt.
Histories of changing numbers of ranks are compared by sample ids and losses.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from forked_ranks import Strike, attempt, be_told, changed, die, fail, toy
from omegaconf import DictConfig

from vlp.training import ledger
from vlp.training.exits import Exit

PLACES = ("data", "counts", "forward", "backward", "optimizer", "save", "log")
KINDS: dict[str, Callable[[], None]] = {"kill": die, "usr1": be_told, "exception": fail}
EXPECTED = {"kill": {-9, Exit.COLLECTIVE_TIMEOUT}, "usr1": {Exit.PREEMPTED}, "exception": {Exit.BUG}}
# Dropout draws by rank, and the first steps of Adam are the sign of the gradient: both off where losses are compared
# between numbers of ranks.
ELASTIC = ("text.config.hidden_dropout_prob=0.0", "optim.eps=1.0", "optim.lr=1.0", "schedule.warmup_steps=0")


class Found(NamedTuple):
    """What the attempts at one run left, against an unbroken run."""

    attempts: int
    struck: int  # steps in which the run was struck
    rows: int  # of the ledger that were compared, those of steps that were done again included
    different: int  # rows whose ids, loss or weights differ in any bit
    lost: int  # steps that a warned attempt had done and not committed
    wrong_codes: list[str]


def chain(place: Path, cfg: DictConfig, name: str, *, world: int, kind: str, steps: int, seed: int) -> Found:
    """Strike a run in every step until it is done, and compare it with the unbroken run of as many ranks."""
    draw, log = random.Random(f"{seed} {world} {kind}"), place / f"{name}.log"
    run = place / "runs" / name
    attempts, struck, wrong, lost, goal = 0, 0, [], 0, 1
    while committed(run) < steps:
        strike = Strike(goal, draw.choice(PLACES), draw.randrange(world), KINDS[kind]) if goal <= steps else None
        done = attempt(
            changed(cfg, run__name=name, data__num_workers=draw.randint(0, 3)), log=log, world_size=world, strike=strike
        )
        attempts, struck, goal = attempts + 1, struck + bool(strike), max(goal + 1, committed(run) + 1)
        allowed = EXPECTED[kind] | {Exit.DONE} if strike else {Exit.DONE}
        if not set(done.codes) <= allowed:
            wrong.append(f"{strike}: {done.codes}: {done.output[-600:]}")
            if len(wrong) > 3:
                break
        rows = [row for row in ledger.read(run / "ledger.jsonl") if "step" in row]
        if Exit.PREEMPTED in done.codes and rows:
            lost += rows[-1]["step"] - committed(run)
    return Found(attempts, struck, *compared(place, run, f"whole{world}"), lost, wrong)


def compared(place: Path, run: Path, whole: str) -> tuple[int, int]:
    """Return how many rows there are, and how many differ from the unbroken run."""
    expected = {row["step"]: bits(row) for row in ledger.read(place / "runs" / whole / "ledger.jsonl") if "step" in row}
    rows = [row for row in ledger.read(run / "ledger.jsonl") if "step" in row]
    missing = expected.keys() - {row["step"] for row in rows}
    return len(rows), sum(bits(row) != expected[row["step"]] for row in rows) + len(missing)


def bits(row: dict) -> tuple:
    return row["ids"], row["loss"], row["weights"]


def committed(run: Path) -> int:
    """Return the newest step that the ledger or the directory of checkpoints knows to be complete."""
    steps = [int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*") if (path / "manifest.json").exists()]
    return max(steps, default=0)


def whole(place: Path, cfg: DictConfig, name: str, *, world: int) -> None:
    """Train without a break."""
    done = attempt(changed(cfg, run__name=name, data__num_workers=0), log=place / f"{name}.log", world_size=world)
    assert done.codes == [0] * world, done.output


def elastic(place: Path, cfg: DictConfig, *, history: Sequence[int], steps: int, seed: int) -> tuple[int, int, float]:
    """Change the number of ranks at drawn steps; return rows, rows with other ids, largest relative error of a loss."""
    draw, name = random.Random(f"{seed} {history}"), "elastic-" + "-".join(map(str, history))
    run, ends = place / "runs" / name, sorted(draw.sample(range(1, steps), len(history) - 1))
    for world, end in zip(history, [*ends, None], strict=True):
        strike = Strike(end, "log", draw.randrange(world), be_told) if end else None
        attempt(changed(cfg, run__name=name), log=place / f"{name}.log", world_size=world, strike=strike)
    expected = {row["step"]: row for row in ledger.read(place / "runs" / "elastic" / "ledger.jsonl") if "step" in row}
    rows = [row for row in ledger.read(run / "ledger.jsonl") if "step" in row]
    other = sum(row["ids"] != expected[row["step"]]["ids"] for row in rows) + len(expected) - len(rows)
    losses = [(float.fromhex(row["loss"]), float.fromhex(expected[row["step"]]["loss"])) for row in rows]
    return len(rows), other, max(abs(mine - whole) / abs(whole) for mine, whole in losses)


def table(place: Path, *, worlds: Sequence[int], kinds: Sequence[str], steps: int, seed: int) -> Iterator[str]:
    """Yield the lines of the table of docs/reliability.md."""
    cfg = toy(place, "x", f"trainer.max_steps={steps}")
    yield "| ranks | struck by | attempts | steps struck | rows compared | rows that differ | steps lost, warned |"
    yield "|---|---|---|---|---|---|---|"
    for world in worlds:
        whole(place, cfg, f"whole{world}", world=world)
        for kind in kinds:
            found = chain(place, cfg, f"{kind}{world}", world=world, kind=kind, steps=steps, seed=seed)
            lost = str(found.lost) if kind == "usr1" else "-"
            yield (
                f"| {world} | {kind} | {found.attempts} | {found.struck} of {steps} | {found.rows} | "
                f"{found.different} | {lost} |"
            )
            yield from (f"wrong exit codes: {line}" for line in found.wrong_codes)


def elastic_table(place: Path, *, steps: int, seed: int) -> Iterator[str]:
    """Yield the lines of the table of changing numbers of ranks."""
    cfg = toy(place, "x", f"trainer.max_steps={steps}", *ELASTIC)
    whole(place, cfg, "elastic", world=1)
    yield "| numbers of ranks | rows compared | rows with other ids | largest difference of a loss, as its share |"
    yield "|---|---|---|---|"
    for history in ((1, 2), (2, 1), (1, 3), (3, 4), (4, 1), (4, 2, 4), (1, 2, 3, 4), (4, 3, 2, 1)):
        rows, other, worst = elastic(place, cfg, history=history, steps=steps, seed=seed)
        yield f"| {', '.join(map(str, history))} | {rows} | {other} | {worst:.1e} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--kind", nargs="*", default=list(KINDS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="only the histories of changing numbers of ranks")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    lines = [] if given.elastic else table(
        place, worlds=given.world, kinds=given.kind, steps=given.steps, seed=given.seed
    )  # fmt: skip
    for line in lines:
        print(line, flush=True)
    if given.elastic or len(given.world) == 4:
        for line in elastic_table(place, steps=given.steps, seed=given.seed):
            print(line, flush=True)
    shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
