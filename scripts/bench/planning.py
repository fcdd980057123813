"""P9, the data position: finding any step of 100 million samples. And what `data.bucket_steps` saves of padding."""

import time
from typing import Any

import numpy as np

from vlp.data.bucket import Bucketed, Order
from vlp.data.plan import PADDING, Plan

SHARDS, PER_SHARD = 100_000, 1_000
BATCH, LANES, MAX_LENGTH = 256, 64, 77
NUM_STEPS = 256  # over which padding is counted


def main() -> dict[str, Any]:
    """Return seconds and shares."""
    started = time.perf_counter()
    plan = _plan(SHARDS, PER_SHARD)
    made = time.perf_counter()
    plan.rank_slots(7, plan.num_steps // 2, 0, 8)
    found = time.perf_counter()
    plan.rank_slots(7, plan.num_steps // 3, 0, 8)
    found_again = time.perf_counter()
    lengths = _lengths(400 * PER_SHARD)
    small = _plan(400, PER_SHARD)
    planned = _padding(small, lengths)
    dealt = _padding(Bucketed(small, sizes=lambda ids: lengths[ids], block_steps=NUM_STEPS, seed=0), lengths)
    return {
        "samples": f"{SHARDS * PER_SHARD:,} in {SHARDS:,} shards",
        "s to make the plan": made - started,
        "s to the middle of a new epoch": found - made,
        "s to another step of that epoch": found_again - found,
        "text": f"mean {lengths.mean():.1f}, longest {lengths.max()} tokens; {BATCH} clips a step, {LANES} lanes",
        "padding, to the longest a text may be": 1 - lengths.mean() / MAX_LENGTH,
        "padding, to the longest of a batch": planned,
        f"padding, bucket_steps={NUM_STEPS}": dealt,
        "text positions computed, bucketed to planned": (1 - planned) / (1 - dealt),
    }


def _plan(num_shards: int, per_shard: int) -> Plan:
    counts = np.full(num_shards, per_shard)
    return Plan(counts, seed=0, num_lanes=LANES, window_shards=4, global_batch=BATCH)


def _lengths(count: int) -> np.ndarray:
    """Lengths of captions in tokens as web data has them: log-normal, mean about 14, cut at the maximum."""
    drawn = np.random.default_rng(0).lognormal(2.4, 0.65, count)
    return drawn.round().clip(3, MAX_LENGTH).astype(np.int64)


def _padding(order: Order, lengths: np.ndarray) -> float:
    """Share of text positions that hold nothing, where a batch is as long as its longest text."""
    real = computed = 0
    for step in range(NUM_STEPS):
        ids = order.rank_slots(0, step, 0, 1)
        here = lengths[ids[ids != PADDING]]
        real, computed = real + here.sum(), computed + len(here) * here.max()
    return 1 - real / computed


if __name__ == "__main__":
    print(main())
