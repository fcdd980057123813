"""How much of the wall time is progress at a rate of failures: what saving, failing and restarting cost.

A failure loses the work since the last checkpoint that was written to its end; failures come at random, independent of
what happened before (exponential times between them).
"""

import math
import random
from typing import NamedTuple


class Saving(NamedTuple):
    """What a checkpoint and a restart cost, in seconds."""

    stall_s: float  # training stands still
    write_s: float  # from the start of the save until the checkpoint would survive a failure; at least the stall
    restart_s: float  # from a failure until training goes on


def best_interval_s(saving: Saving, mtbf_s: float) -> float:
    """Return the time between the starts of two saves that loses least; never shorter than one write.

    Source: arXiv:2410.18124, the optimum of stalls against lost work.
    """
    stall = saving.stall_s
    best = stall + math.sqrt(2 * (mtbf_s + saving.restart_s) * stall + stall**2)
    return max(best, saving.write_s)


def simulate(
    saving: Saving, mtbf_s: float, *, interval_s: float | None = None, days: float = 10, seed: int = 0
) -> float:
    """Return the share of `days` that was progress, for one drawn history of failures."""
    interval = interval_s or best_interval_s(saving, mtbf_s)
    draw, end = random.Random(seed), days * 86_400
    now = kept = 0.0
    while now < end:
        failure = min(now + draw.expovariate(1 / mtbf_s), end)
        kept += _progress(saving, interval, failure - now, died=failure < end)
        now = failure + saving.restart_s
    return kept / end


def goodput(saving: Saving, mtbf_s: float, *, interval_s: float | None = None, seeds: int = 6) -> float:
    """Return the mean share over several histories."""
    return sum(simulate(saving, mtbf_s, interval_s=interval_s, seed=seed) for seed in range(seeds)) / seeds


def _progress(saving: Saving, interval: float, time: float, *, died: bool) -> float:
    """Return the seconds of work that remain of `time` seconds of training from a fresh start."""
    work = interval - saving.stall_s  # between two saves
    if not died:
        cycles, rest = divmod(time, interval)
        return cycles * work + min(rest, work)
    durable = max(0, math.floor((time - work - saving.write_s) / interval) + 1)  # saves that were written to the end
    return durable * work
