"""Pure tensor functions.

Axes: B clips, N draws or tokens, K kept items.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's >> on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64(x: Tensor) -> Tensor:
    """Hash int64 element-wise (splitmix64), with the same result on every device."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def fold(key: Tensor, salt: int) -> Tensor:
    """Derive an independent key [B] int64 from `key` [B] for the purpose `salt`."""
    return hash64(hash64(key) ^ salt)


def uniform(key: Tensor, num: int) -> Tensor:
    """Draw [B, num] float32 in [0, 1) from counter keys [B] int64: no state, so no rank or worker can change a draw."""
    counters = hash64(torch.arange(num, device=key.device))  # [N]
    bits = hash64(key[:, None] ^ counters[None, :])  # [B, N]
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def pair_uniform(rows: Tensor, columns: Tensor) -> Tensor:
    """Draw [B, N] float32 in [0, 1) for each pair of keys [B] and [N]; a pair's draw does not depend on its place."""
    return _shift(hash64(rows[:, None] ^ hash64(columns)[None, :]), 40).to(torch.float32) * 2.0**-24


def choose(scores: Tensor, counts: Tensor) -> Tensor:
    """Return [B, N] bool that is True at the `counts` [B] highest `scores` [B, N] of each row."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # [B, N]
    return ranks < counts[:, None]
