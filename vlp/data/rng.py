"""Randomness without state: every draw is a function of (seed, epoch, source, sample, purpose).

So workers, ranks and restarts cannot change what a sample looks like. `vlp.ops.uniform` continues from the same keys
on the device.
"""

import zlib

import numpy as np

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """Hash integers into one signed 64-bit key (splitmix64 finaliser after each value)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


def sample_key(seed: int, epoch: int, source: int, sample_id: int) -> int:
    """Return the signed 64-bit key of one sample in one epoch."""
    return mix(seed, epoch, source, sample_id)


def generator(key: int, purpose: str) -> np.random.Generator:
    """Return a fresh counter-based generator; `purpose` separates the streams of a key.

    Purposes are "times", "crop", "caption", and "times1", "crop1", ... of the other clips of a sample.
    """
    return np.random.Generator(np.random.Philox(key=[key & _MASK, zlib.crc32(purpose.encode())]))
