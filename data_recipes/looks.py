"""What a video looks like in 256 bits, and which videos look the same: copies survive scaling and encoding again.

4 frames evenly over the time --grey, 9 x 8 cells--> which cell is brighter than the one left of it --> 4 x 64 bits
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vlp.data.decode import DecodeError, decode
from vlp.data.probe import ProbeError, probe

NUM_FRAMES = 4
ROWS, COLUMNS = 8, 8
MAX_BITS = 24  # of 256 may differ; copies in half the size and a third of the rate differ by 4 to 24, other clips by 89
_BAND, _STEP = 4, 2  # hexadecimal digits: what looks the same shares a band, two rows of cells, with near certainty
_MARGIN = 3.0  # grey levels: smaller differences are noise of the encoder and count as none
_MIN_BITS = 8  # set bits, and unset ones: what has fewer is one colour, and would look like any other
_SIZE_FRAMES = 64  # pixels of the short side that frames are decoded to


class Look(NamedTuple):
    """What a sample looks like."""

    bits: str  # 64 hexadecimal digits; "" where nothing can be said
    duration_s: float


def look(data: bytes, span: tuple[float, float] | None) -> Look:
    """Return what a video looks like, or a part of it; no bits if it cannot be decoded or is of one colour."""
    try:
        facts = probe(data)
        start_s, end_s = span or (0.0, facts.duration_s)
        end_s = min(end_s, facts.duration_s)
        times_s = start_s + (np.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES * max(0.0, end_s - start_s)
        frames = decode(data, times_s, short_side=_SIZE_FRAMES, key_frames=facts.key_frames).frames
    except (ProbeError, DecodeError):
        return Look("", 0.0)
    bits = np.concatenate([_brighter(frame).ravel() for frame in frames])
    telling = _MIN_BITS <= int(bits.sum()) <= len(bits) - _MIN_BITS
    return Look(np.packbits(bits).tobytes().hex() if telling else "", round(end_s - start_s, 3))


def _brighter(frame: np.ndarray) -> np.ndarray:
    """Return where the cells [ROWS, COLUMNS] of a frame [H, W, 3] are brighter than their left neighbours."""
    grey = frame @ np.array([0.299, 0.587, 0.114])  # [H, W]
    bands = [part.mean(axis=0) for part in np.array_split(grey, ROWS, axis=0)]
    cells = np.array([[part.mean() for part in np.array_split(band, COLUMNS + 1)] for band in bands])
    return cells[:, 1:] > cells[:, :-1] + _MARGIN


def duplicates(looks: Sequence[Look], *, max_bits: int = MAX_BITS) -> Iterator[tuple[int, int]]:
    """Yield (later, first) of the positions that look the same and last the same time to within a tenth.

    The first is always one that is no duplicate itself.
    """
    kept: dict[tuple[int, str], list[int]] = {}  # by number and content of a band
    for later, seen in enumerate(looks):
        if not seen.bits:
            continue
        bands = [(at, seen.bits[at : at + _BAND]) for at in range(0, len(seen.bits) - _BAND + 1, _STEP)]
        candidates = sorted({number for band in bands for number in kept.get(band, ())})
        same = (number for number in candidates if _same(looks[number], seen, max_bits))
        first = next(same, None)
        if first is not None:
            yield later, first
            continue
        for band in bands:
            kept.setdefault(band, []).append(later)


def _same(one: Look, two: Look, max_bits: int) -> bool:
    longer = max(one.duration_s, two.duration_s)
    differ = (int(one.bits, 16) ^ int(two.bits, 16)).bit_count()
    return differ <= max_bits and abs(one.duration_s - two.duration_s) <= 0.1 * longer + 0.05
