"""Batches of samples of like size, so that little is padded: a plan whose steps are dealt again inside blocks.

    plan: step s takes B / L samples from each lane        block: K steps, K * B / L samples of each lane
    in each lane the block is sorted by size and cut into K slices; the step takes the same slice of every lane

Every lane's samples stay in their block and lane: nothing is lost or repeated, no rank reads other shards, and every
world size that divides L still reads the same global batches. Axes: K steps, B clips, L lanes, R slots of a rank.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from vlp.data.plan import PADDING
from vlp.data.rng import generator, mix

Sizes = Callable[[np.ndarray], np.ndarray]  # sample ids [N] -> sizes [N], the larger the more is padded


class Order(Protocol):
    """Which sample is trained on when: `vlp.data.plan.Plan`, or one that is `Bucketed`."""

    num_steps: int
    num_lanes: int
    global_batch: int

    def rank_slots(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """Return the sample ids of a rank in one step, [R] int64."""
        ...

    def upcoming(self, epoch: int, step: int, rank: int, world_size: int) -> list[int]:
        """Return the shards that a rank reads from in a step, then those that it will need after them."""
        ...


class _Block(NamedTuple):
    name: tuple[int, int, int, int]  # epoch, number of the block, rank, world size
    slots: np.ndarray  # [K, R]


class Bucketed:
    """The samples of a plan in batches of like size; PADDING still stands in the last step of an epoch only."""

    def __init__(self, plan: Order, *, sizes: Sizes, block_steps: int, seed: int) -> None:
        """Deal blocks of `block_steps` steps again by the `sizes` of their samples.

        Raises:
            ValueError: a block has no step.
        """
        if block_steps < 1:
            raise ValueError(f"block_steps={block_steps} must be at least 1, which leaves the plan as it is.")
        self.plan, self.sizes, self.block_steps, self.seed = plan, sizes, block_steps, seed
        self.num_steps, self.num_lanes, self.global_batch = plan.num_steps, plan.num_lanes, plan.global_batch
        self._block: _Block | None = None  # the last one asked for

    def rank_slots(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """Return the sample ids of a rank in one step, [R] int64."""
        number, row = divmod(step, self.block_steps)
        name = (epoch, number, rank, world_size)
        if self._block is None or self._block.name != name:
            self._block = _Block(name, self._dealt(*name))
        return self._block.slots[row]

    def upcoming(self, epoch: int, step: int, rank: int, world_size: int) -> list[int]:
        """Return the shards of the block of a step, then those that the plan needs after it."""
        first = step // self.block_steps * self.block_steps
        steps = range(first, min(first + self.block_steps, self.num_steps))
        return list(dict.fromkeys(n for at in steps for n in self.plan.upcoming(epoch, at, rank, world_size)))

    def _dealt(self, epoch: int, number: int, rank: int, world_size: int) -> np.ndarray:
        """Return the slots [K, R] of a block, each lane sorted by size, the slices in a random order."""
        steps = range(number * self.block_steps, min((number + 1) * self.block_steps, self.num_steps))
        ids = np.stack([self.plan.rank_slots(epoch, step, rank, world_size) for step in steps])  # [K, R]
        sizes = np.full(ids.shape, np.iinfo(np.int64).max)
        sizes[ids != PADDING] = self.sizes(ids[ids != PADDING])
        num_lanes = self.num_lanes // world_size  # of this rank: slot i belongs to lane i % num_lanes
        for lane in range(num_lanes):
            columns = ids[:, lane::num_lanes]
            order = np.argsort(sizes[:, lane::num_lanes], axis=None, kind="stable")  # padding comes last
            ids[:, lane::num_lanes] = columns.reshape(-1)[order].reshape(columns.shape)
        return ids[self._turns(epoch, number, len(steps), ends=steps.stop == self.num_steps)]

    def _turns(self, epoch: int, number: int, num_steps: int, *, ends: bool) -> np.ndarray:
        """Return which slice each step takes, [K]; the same for all lanes. The end of an epoch keeps its last one."""
        turns = generator(mix(self.seed, epoch, number), "bucket").permutation(num_steps - ends)
        return np.append(turns, num_steps - 1) if ends else turns
