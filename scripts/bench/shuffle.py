"""How well the plan shuffles, against a full shuffle of all samples (1.0), by lanes and window.

Displacement: how far a sample moves from its place in the shards. Shard spread: how far apart in the epoch two
samples of one shard are. Pairs of one shard: pairs of clips in a batch from one shard, as a multiple of a full shuffle.
"""

from typing import Any

import numpy as np

from vlp.data.plan import PADDING, Plan

SHARDS, PER_SHARD, BATCH = 1_000, 300, 256
LAYOUTS = ((8, 1), (8, 4), (8, 16), (64, 1), (64, 4), (64, 16), (256, 4))  # lanes, window_shards


def main() -> dict[str, Any]:
    """Return a row for each layout."""
    head = {"samples": f"{SHARDS * PER_SHARD:,} in {SHARDS:,} shards; {BATCH} clips a step"}
    rows = {f"lanes {lanes}, window_shards {window}": _row(lanes, window) for lanes, window in LAYOUTS}
    return head | {"": "displacement / shard spread / pairs of one shard"} | rows


def _row(lanes: int, window: int) -> str:
    plan = Plan(np.full(SHARDS, PER_SHARD), seed=0, num_lanes=lanes, window_shards=window, global_batch=BATCH)
    ids = np.stack([plan.step(0, step) for step in range(plan.num_steps)])  # [steps, B]
    return " / ".join(f"{value:.2f}" for value in figures(ids, per_shard=PER_SHARD))


def figures(ids: np.ndarray, *, per_shard: int) -> tuple[float, float, float]:
    """Return displacement, shard spread and pairs of one shard of an epoch [steps, B], each as a multiple."""
    order = ids[ids != PADDING]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    displacement = np.abs(place - np.arange(len(order))).mean() / len(order) * 3  # a full shuffle moves by a third
    mates = np.sort(place.reshape(-1, per_shard), axis=1) / len(order)
    weights = 2 * np.arange(per_shard) - per_shard + 1  # sum of all differences of sorted numbers
    spread = (mates @ weights / (per_shard * (per_shard - 1) / 2)).mean() * 3
    whole = ids[:-1] // per_shard
    same = np.mean([(np.unique(step, return_counts=True)[1] ** 2).sum() - len(step) for step in whole])
    pairs = same / (whole.shape[1] * (whole.shape[1] - 1)) / ((per_shard - 1) / (len(order) - 1))
    return float(displacement), float(spread), float(pairs)


if __name__ == "__main__":
    print(main())
