"""P7: padding, and the slowest of 64 simulated ranks against their mean, on lengths as mixed data has them.

Half images, half clips of 4 to 32 frames of 196 patches; captions of mean 14 tokens, longest 77; 8 clips a rank.
A batch of a rank is as long as its longest clip and its longest text. Work is positions computed, padding included.
"""

from typing import Any

import numpy as np

from vlp.data.balance import Balanced
from vlp.data.bucket import Bucketed, Order
from vlp.data.plan import PADDING, Plan

RANKS, BATCH, PATCHES, MAX_FRAMES, MAX_LENGTH = 64, 512, 196, 32, 77
SAMPLES, NUM_STEPS, BLOCK = 400_000, 64, 256


def main() -> dict[str, Any]:
    """Return shares and ratios."""
    frames, words = _lengths()
    plan = Plan(np.full(400, SAMPLES // 400), seed=0, num_lanes=RANKS, window_shards=4, global_batch=BATCH)

    def sizes(ids: np.ndarray) -> np.ndarray:
        return (frames[ids].astype(np.int64) << 32) + words[ids]

    dealt = Bucketed(plan, sizes=sizes, block_steps=BLOCK, seed=0)
    orders: dict[str, Order] = {"as planned": plan, "balance": Balanced(plan, sizes=sizes, accumulate=1)}
    orders |= {f"bucket_steps={BLOCK}": dealt}
    orders |= {f"bucket_steps={BLOCK} and balance": Balanced(dealt, sizes=sizes, accumulate=1)}
    longest = MAX_FRAMES * PATCHES + MAX_LENGTH
    useful = float(frames.mean() * PATCHES + words.mean()) / longest
    rows = {name: _measured(order, frames, words) for name, order in orders.items()}
    figures: dict[str, Any] = {"padding, to the longest that a clip may be": 1 - useful}
    for name, (padding, slowest, real) in rows.items():
        figures[f"padding, {name}"] = padding
        figures[f"slowest rank / mean, {name}"] = slowest
        figures[f"slowest rank / mean in real tokens, {name}"] = real
    padding, slowest, _ = rows[f"bucket_steps={BLOCK}"]
    figures[f"useful share of what the slowest rank computes, bucket_steps={BLOCK}"] = (1 - padding) / slowest
    figures[f"useful tokens against padding to the longest, bucket_steps={BLOCK}"] = (1 - padding) / slowest / useful
    return figures


def _lengths() -> tuple[np.ndarray, np.ndarray]:
    """Draw frames and caption lengths in tokens."""
    rng = np.random.default_rng(0)
    frames = np.where(rng.random(SAMPLES) < 0.5, 1, rng.integers(4, MAX_FRAMES + 1, SAMPLES))
    return frames, rng.lognormal(2.4, 0.65, SAMPLES).round().clip(3, MAX_LENGTH).astype(np.int64)


def _measured(order: Order, frames: np.ndarray, words: np.ndarray) -> tuple[float, float, float]:
    """Return padding, and slowest against mean in positions and in real tokens, over some steps of an epoch."""
    computed, real = np.zeros((2, NUM_STEPS, RANKS))
    for rank in range(RANKS):
        for number, step in enumerate(np.linspace(0, BLOCK - 1, NUM_STEPS).astype(int)):
            ids = order.rank_slots(0, int(step), rank, RANKS)
            ids = ids[ids != PADDING]
            computed[number, rank] = len(ids) * (frames[ids].max() * PATCHES + words[ids].max())
            real[number, rank] = frames[ids].sum() * PATCHES + words[ids].sum()
    slowest = [float((work.max(axis=1) / work.mean(axis=1)).mean()) for work in (computed, real)]
    return 1 - float(real.sum() / computed.sum()), *slowest


if __name__ == "__main__":
    print(main())
