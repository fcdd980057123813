"""Like work for all ranks: the clips of a step dealt to ranks and micro-batches by size.

    global batch of a step, longest first |-- micro-batch 0 --|-- micro-batch 1 --|-- ... --|   equal numbers of clips
    in each micro-batch: the longest clip that is left goes to the rank that has least so far

All ranks wait for the slowest, and a batch is as long as its longest clip. So each micro-batch holds clips of like
size, and in each the ranks get like shares. Number of clips, global batch and micro-batches stay what they are for
every world size; only who reads a clip changes. Axes: B clips of a step, R slots of a rank.
"""

import heapq

import numpy as np

from vlp.data.bucket import Order, Sizes
from vlp.data.plan import PADDING, check_layout


class Balanced:
    """The steps of an order, dealt so that no rank has much more to do than another. Any rank may read any shard."""

    def __init__(self, plan: Order, *, sizes: Sizes, accumulate: int) -> None:
        """Deal the clips of each step of `plan` to `accumulate` micro-batches of each rank by their `sizes`."""
        self.plan, self.sizes, self.accumulate = plan, sizes, accumulate
        self.num_steps, self.num_lanes, self.global_batch = plan.num_steps, plan.num_lanes, plan.global_batch

    def rank_slots(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """Return the sample ids of a rank in one step, micro-batch after micro-batch, [R] int64."""
        check_layout(
            global_batch=self.global_batch,
            num_lanes=self.num_lanes,
            world_size=world_size,
            accumulate=self.accumulate,
        )
        ids = self.plan.rank_slots(epoch, step, 0, 1)  # [B]
        known = self.sizes(ids[ids != PADDING])
        sizes = np.full(len(ids), known.max(initial=0) + 1)  # a masked slot is as long as a clip can be
        sizes[ids != PADDING] = known
        order = np.argsort(-sizes, kind="stable")
        micro_batches = order.reshape(self.accumulate, -1)  # [accumulate, B / accumulate], longest first
        return ids[np.concatenate([micro[_dealt(sizes[micro], rank, world_size)] for micro in micro_batches])]

    def upcoming(self, epoch: int, step: int, rank: int, world_size: int) -> list[int]:
        """Return the shards that any rank reads from in a step, then those needed after them."""
        return self.plan.upcoming(epoch, step, 0, 1)


def _dealt(sizes: np.ndarray, rank: int, world_size: int) -> list[int]:
    """Deal clips, longest first, each to the rank that has least so far and is not full; return those of a rank."""
    room = [len(sizes) // world_size] * world_size
    loads = [(0, each) for each in range(world_size)]  # a heap
    mine = []
    for place, size in enumerate(sizes.tolist()):
        load, least = loads[0]
        room[least] -= 1
        if least == rank:
            mine.append(place)
        if room[least]:
            heapq.heapreplace(loads, (load + size, least))
        else:
            heapq.heappop(loads)
    return mine
