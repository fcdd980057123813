"""Draws of the plan by the hundred million: random histories of kills, world sizes, sources and buckets.

    python tests/plan_draws.py 100000000 [SEED]

A history draws a data set (sources, shards of any sizes, empty ones too), a layout (lanes, window, batch, buckets) and
a life: attempts that begin at the committed step, each with another world size, and die some steps behind what they
committed. What all attempts committed must be every sample of an epoch exactly once, and every step of every attempt,
put together from its ranks, the global batch that one process would read.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vlp.data.bucket import Bucketed, Order
from vlp.data.mix import Schedule
from vlp.data.plan import PADDING, Plan

LANES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 64, 96, 240, 512)
CALL_COST = 1000  # a call costs as much as so many slots: histories of many ranks with few slots each are short


class Count(NamedTuple):
    """What the histories saw."""

    histories: int = 0
    attempts: int = 0
    draws: int = 0  # slots of committed steps, padding not counted
    lost: int = 0  # samples of a whole epoch that no committed step held
    repeated: int = 0  # held more than once
    changed: int = 0  # slots that differ from those of one process, in committed steps and in others
    misplaced: int = 0  # padding before the last step of an epoch, or ids that do not exist

    def plus(self, other: "Count") -> "Count":
        return Count(*(one + two for one, two in zip(self, other, strict=True)))


class Settings(NamedTuple):
    """A drawn data set and layout."""

    counts: list[np.ndarray]  # of each source
    lanes: int
    batch: int
    window: int
    block: int  # steps of a bucket; 1 = as planned
    weights: list[float]
    seed: int

    def orders(self) -> list[Order]:
        """Return what a process makes of the sources when it starts."""
        return [self._order(number) for number in range(len(self.counts))]

    def _order(self, number: int) -> Order:
        seed = self.seed + number
        layout = {"num_lanes": self.lanes, "window_shards": self.window, "global_batch": self.batch}
        plan = Plan(self.counts[number], seed=seed, **layout)
        return plan if self.block == 1 else Bucketed(plan, sizes=_sizes, block_steps=self.block, seed=seed)


def _sizes(ids: np.ndarray) -> np.ndarray:
    return ids * 7919 % 251


def drawn(rng: np.random.Generator, *, max_batch: int) -> Settings:
    """Draw a data set and a layout."""
    lanes = int(rng.choice(LANES))
    batch = lanes * int(rng.integers(1, 4) if rng.random() < 0.3 else rng.integers(1, max(2, max_batch // lanes)))
    counts = [_shards(rng, at_least=batch) for _ in range(rng.integers(1, 4))]
    return Settings(
        counts=counts,
        lanes=lanes,
        batch=batch,
        window=int(rng.integers(1, 17)),
        block=int(rng.choice([1, rng.integers(2, 30)])),
        weights=[float(rng.uniform(0.2, 1)) for _ in counts],
        seed=int(rng.integers(2**31)),
    )


def _shards(rng: np.random.Generator, *, at_least: int) -> np.ndarray:
    """Draw the sizes of shards: alike, or of all sizes, some without a sample."""
    num = int(rng.choice([1, rng.integers(2, 12), rng.integers(12, 700)]))
    mean = max(at_least / num, float(rng.choice([1, 40, 900, 4000])))
    alike, ragged = np.full(num, round(mean)), rng.lognormal(np.log(mean), 1.5, num).round().astype(np.int64)
    counts = alike if rng.random() < 0.5 else np.where(rng.random(num) < 0.1, 0, ragged)
    counts = counts.clip(max=50_000)
    return np.append(counts, max(0, at_least - counts.sum())).astype(np.int64)


def history(seed: int, *, budget: int) -> Count:
    """Live one history of about `budget` slots and compare it with an unbroken one."""
    rng = np.random.default_rng(seed)
    settings = drawn(rng, max_batch=budget // 16)
    schedule, orders = Schedule(settings.weights, seed=settings.seed), settings.orders()
    worlds = [world for world in range(1, settings.lanes + 1) if settings.lanes % world == 0]
    worlds = worlds[: int(rng.integers(1, len(worlds) + 1))]
    num_steps = min(budget // (settings.batch + max(worlds) * CALL_COST // 2), 3 * sum(o.num_steps for o in orders))
    num_steps = max(3, num_steps)
    expected = [_slots(schedule, orders, step, 0, 1) for step in range(num_steps)]
    cursor, attempts, changed = 0, 0, 0
    committed: list[np.ndarray] = []
    while cursor < num_steps:
        world, attempts = int(rng.choice(worlds)), attempts + 1
        stop = min(num_steps, cursor + int(rng.integers(1, 1 + max(2, num_steps // 3))))
        read = list(_attempt(settings, schedule, range(cursor, stop), world))
        changed += sum(int((got != expected[cursor + i]).sum()) for i, got in enumerate(read))
        kept = len(read) if stop == num_steps else int(rng.integers(0, len(read) + 1))
        committed += read[:kept]
        cursor += kept
    return _verdict(schedule, orders, committed).plus(Count(1, attempts, changed=changed))


def _attempt(settings: Settings, schedule: Schedule, steps: range, world: int) -> Iterator[np.ndarray]:
    """Yield the global batch of each step as the ranks of one attempt read it, each with a plan of its own."""
    ranks = [settings.orders() for _ in range(min(world, 8))]  # more only share: a plan has no state but caches
    for step in steps:
        whole = np.full(settings.batch, PADDING - 1)
        for rank in range(world):
            whole[rank::world] = _slots(schedule, ranks[rank % len(ranks)], step, rank, world)
        yield whole


def _slots(schedule: Schedule, orders: list[Order], step: int, rank: int, world: int) -> np.ndarray:
    source, cursor = schedule.turn(step)
    epoch, place = divmod(cursor, orders[source].num_steps)
    return orders[source].rank_slots(epoch, place, rank, world)


def _verdict(schedule: Schedule, orders: list[Order], committed: list[np.ndarray]) -> Count:
    """Count what each epoch of each source lacks or has twice."""
    turns = [schedule.turn(step) for step in range(len(committed))]
    total = Count()
    for number, order in enumerate(orders):
        mine = [ids for turn, ids in zip(turns, committed, strict=True) if turn.source == number]
        for first in range(0, len(mine), order.num_steps):
            total = total.plus(_epoch_verdict(mine[first : first + order.num_steps], order))
    return total


def _epoch_verdict(steps: list[np.ndarray], order: Order) -> Count:
    num_samples = (order.plan if isinstance(order, Bucketed) else order).num_samples  # type: ignore[attr-defined]
    whole, last = len(steps) == order.num_steps, np.concatenate(steps[order.num_steps - 1 :] or [np.zeros(0, np.int64)])
    ids = np.concatenate(steps)
    padding = ids == PADDING
    wrong = int(padding.sum() - (last == PADDING).sum()) + int((ids >= num_samples).sum() + (ids < PADDING).sum())
    seen = np.bincount(ids[~padding].clip(0, num_samples - 1), minlength=num_samples)
    lost = int((seen == 0).sum()) if whole else 0
    return Count(draws=int(seen.sum()), lost=lost, repeated=int((seen > 1).sum()), misplaced=wrong)


def run(*, draws: int, seed: int, budget: int, processes: int = 1) -> Count:
    """Live histories until so many slots have been drawn."""
    total = Count()
    work = ((seed * 1_000_003 + number, budget) for number in range(10**9))
    if processes == 1:
        while total.draws < draws:
            total = total.plus(_history(next(work)))
        return total
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        while total.draws < draws:
            for count in pool.imap_unordered(_history, [next(work) for _ in range(16 * processes)]):
                total = total.plus(count)
    return total


def _history(work: tuple[int, int]) -> Count:
    return history(work[0], budget=work[1])


def main(arguments: list[str]) -> int:
    """Draw as many as the command line says; 1 if anything was wrong."""
    draws, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0
    began = time.monotonic()
    total = run(draws=draws, seed=seed, budget=1_000_000, processes=len(os.sched_getaffinity(0)))
    print(total, f"seed {seed}, {time.monotonic() - began:.0f} s")
    return bool(total.lost + total.repeated + total.changed + total.misplaced)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
