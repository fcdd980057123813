"""Which sample is trained on when: a pure function of (seed, epoch, step), with no state and no table per sample.

Axes: S shards, L lanes, B clips of a global batch, K a few positions.

    shards, permuted by (seed, epoch), samples permuted inside each shard        one sequence of N samples
    |------ lane 0 ------|------ lane 1 ------|------ lane 2 ------|              L equal cuts, +-1 sample
    |window|window|window|window|window|      |                                   G shards each, permuted inside
    step s takes B / L samples from each lane; position i of a batch belongs to lane i % L; rank r owns i % W == r

The lanes do not know how many ranks there are, so every world size W that divides L reads the same global batches.
A permutation is computed per position (a small Feistel network), never stored: a step costs O(B log S) wherever it is.
"""

from typing import Any

import numpy as np

from vlp.data.rng import mix

VERSION = 1  # of the order; part of a checkpoint's data position, raised when the same arguments give another order
PADDING = -1  # the id of a slot after the end of an epoch

_ROUNDS = 8  # pairs of Feistel rounds: with 6, permutations of 6 things are not yet equally frequent


def check_layout(*, global_batch: int, num_lanes: int, world_size: int, accumulate: int = 1) -> None:
    """Raise ValueError unless every rank gets equal micro-batches made of whole lanes."""
    if global_batch % num_lanes:
        near = global_batch // num_lanes * num_lanes or num_lanes
        raise ValueError(
            f"batch_size={global_batch} is not a multiple of num_lanes={num_lanes}; set batch_size to {near} "
            f"or num_lanes to a divisor of {global_batch}."
        )
    if global_batch % accumulate:
        raise ValueError(
            f"batch_size={global_batch} is not a multiple of accumulate={accumulate}; set batch_size to a multiple of "
            f"{accumulate} or accumulate to a divisor of {global_batch}."
        )
    if num_lanes % world_size or global_batch % (world_size * accumulate):
        allowed = [w for w in range(1, num_lanes + 1) if num_lanes % w == 0 and global_batch % (w * accumulate) == 0]
        raise ValueError(
            f"world_size={world_size} does not fit num_lanes={num_lanes}, batch_size={global_batch}, "
            f"accumulate={accumulate}; use a world size of {' or '.join(map(str, allowed))}, or change those three."
        )


class Plan:
    """The order of one source. A sample id is its position in the concatenation of the shards."""

    def __init__(
        self,
        counts: np.ndarray,
        *,
        seed: int,
        num_lanes: int,
        window_shards: int,
        global_batch: int,
        name: str = "data",
    ) -> None:
        """Plan shards of `counts` [S] samples; `name` is the source in messages. Raises ValueError on a bad layout."""
        check_layout(global_batch=global_batch, num_lanes=num_lanes, world_size=1)
        if window_shards < 1:
            raise ValueError(
                f"window_shards={window_shards} must be at least 1; it counts the shards shuffled together."
            )
        self.counts = np.asarray(counts, dtype=np.int64)
        self.offsets = _offsets(self.counts)  # [S+1]
        self.num_samples = int(self.offsets[-1])
        if self.num_samples < global_batch:
            whole = self.num_samples // num_lanes * num_lanes
            fix = f"batch_size to {whole}" if whole else f"num_lanes and batch_size to at most {self.num_samples}"
            raise ValueError(
                f"source {name!r} has {self.num_samples} training samples in {len(self.counts)} shards, fewer than one "
                f"global batch of batch_size={global_batch} (num_lanes={num_lanes}); add samples or set {fix}."
            )
        self.seed, self.num_lanes, self.window_shards, self.global_batch = seed, num_lanes, window_shards, global_batch
        self.num_steps = -(-self._lane_start(1) // (global_batch // num_lanes))  # of one epoch
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def step(self, epoch: int, step: int) -> np.ndarray:
        """Return the sample ids of a global batch, [B] int64, PADDING only at the end of the last step of an epoch."""
        return self._ids(epoch, step, np.arange(self.global_batch))

    def rank_slots(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """Return `step(epoch, step)[rank::world_size]`, [B / W] int64, at the cost of those slots only."""
        check_layout(global_batch=self.global_batch, num_lanes=self.num_lanes, world_size=world_size)
        return self._ids(epoch, step, np.arange(rank, self.global_batch, world_size))

    def upcoming(self, epoch: int, step: int, rank: int, world_size: int) -> list[int]:
        """Return the shards of the windows that a rank reads from in a step, then those of the windows after them.

        Each shard once, in the order in which the lanes come to their windows; after the last window of an epoch comes
        the first of the next.
        """
        lanes = np.arange(rank, self.num_lanes, world_size)
        now, then = self._windows(epoch, step, lanes)
        if not all(then):
            begin, _ = self._windows(epoch + 1, 0, lanes)
            then = [window or first for window, first in zip(then, begin, strict=True)]
        return list(dict.fromkeys(shard for windows in (now, then) for window in windows for shard in window))

    def _windows(self, epoch: int, step: int, lanes: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
        """Return the shards of the window in which each lane is at a step, and of the next, empty after the last."""
        order, begins = self._order(epoch)
        start, end = self._lane_start(lanes), self._lane_start(lanes + 1)
        place = np.minimum(start + step * (self.global_batch // self.num_lanes), end - 1)
        first, index, last = (np.searchsorted(begins, at, side="right") - 1 for at in (start, place, end - 1))
        window = first + (index - first) // self.window_shards * self.window_shards
        stops = [np.minimum(window + turn * self.window_shards, last + 1) for turn in (1, 2)]
        now = [order[low:high].tolist() for low, high in zip(window, stops[0], strict=True)]
        return now, [order[low:high].tolist() for low, high in zip(*stops, strict=True)]

    def _lane_start(self, lane: Any) -> Any:
        """Return the first position of a lane (int or array) in the sequence; no lane is longer than the first."""
        return -(-lane * self.num_samples // self.num_lanes)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the permuted shards [S] and where each begins in the sequence [S+1]; the last epoch is kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            key = np.uint64(mix(self.seed, epoch) % 2**64)
            order = np.argsort(_hash(np.arange(len(self.counts), dtype=np.uint64) + key))
            self._epoch = (epoch, order, _offsets(self.counts[order]))
        return self._epoch[1], self._epoch[2]

    def _ids(self, epoch: int, step: int, position: np.ndarray) -> np.ndarray:
        """Return the sample ids at positions [K] of a global batch."""
        assert 0 <= step < self.num_steps, f"step {step} of {self.num_steps}"
        order, begins = self._order(epoch)
        lane = position % self.num_lanes
        start, end = self._lane_start(lane), self._lane_start(lane + 1)
        place = start + step * (self.global_batch // self.num_lanes) + position // self.num_lanes
        real = place < end
        place = self._shuffle_window(np.minimum(place, end - 1), start, end, begins, mix(self.seed, epoch, 1))
        index = np.searchsorted(begins, place, side="right") - 1  # of the shard in the permuted order
        shard = order[index]
        row = _permuted(place - begins[index], self.counts[shard], shard, mix(self.seed, epoch, 2))
        return np.where(real, self.offsets[shard] + row, PADDING)

    def _shuffle_window(
        self, place: np.ndarray, start: np.ndarray, end: np.ndarray, begins: np.ndarray, key: int
    ) -> np.ndarray:
        """Permute places [K] of the sequence inside their windows: G whole shards, cut at the ends of the lane."""
        first = np.searchsorted(begins, start, side="right") - 1
        index = np.searchsorted(begins, place, side="right") - 1
        window = first + (index - first) // self.window_shards * self.window_shards
        low = np.maximum(start, begins[window])
        high = np.minimum(end, begins[np.minimum(window + self.window_shards, len(self.counts))])
        return low + _permuted(place - low, high - low, low, key)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _hash(values: np.ndarray) -> np.ndarray:
    """Splitmix64 finaliser of uint64 values; not numpy's generators, whose streams may change between versions."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _permuted(index: np.ndarray, size: np.ndarray, stream: np.ndarray, key: int) -> np.ndarray:
    """Return the images of index [K] under pseudo-random permutations of range(size [K]), one per (stream [K], key)."""
    stream = _hash(_hash(stream.astype(np.uint64)) + np.uint64(key % 2**64))
    height = np.ceil(np.sqrt(size)).astype(np.int64)
    width = -(-size // height)  # height * width >= size
    image = _feistel(index, height, width, stream)
    while (outside := np.flatnonzero(image >= size)).size:  # walk the cycle back into the range: still a bijection
        image[outside] = _feistel(image[outside], height[outside], width[outside], stream[outside])
    return image


def _feistel(index: np.ndarray, height: np.ndarray, width: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Permute range(height * width): each half in turn is shifted by a hash of the other."""
    row, column = np.divmod(index, width)
    for turn in range(_ROUNDS):
        row = (row + _shift(column, stream, 2 * turn)) % height
        column = (column + _shift(row, stream, 2 * turn + 1)) % width
    return row * width + column


def _shift(half: np.ndarray, stream: np.ndarray, turn: int) -> np.ndarray:
    salt = np.uint64(mix(turn) % 2**64)
    return (_hash(half.astype(np.uint64) + stream + salt) >> np.uint64(2)).astype(np.int64)  # sums stay below 2**63
