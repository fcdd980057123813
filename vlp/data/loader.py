"""What a trainer iterates over: this rank's micro-batches of each optimizer step, and its batches of a test split.

    step --schedule--> source, its cursor --plan--> sample ids of this rank --reader--> samples --collate--> Batch

All of it is a function of the step, so a loader begins anywhere, and which worker does what changes nothing. The plan
also tells which shards come next: remote ones are fetched ahead, if there is a cache. Ranks that train together meet
before each step: none begins one while another still waits for its samples.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vlp.data.bucket import Order
from vlp.data.collate import collate
from vlp.data.columns import PARTS
from vlp.data.fields import ClipReader
from vlp.data.mix import Schedule
from vlp.data.outage import Announcer, Outage, Waiting, patiently
from vlp.data.remote import RETRY, is_remote
from vlp.data.sandbox import Sandbox
from vlp.data.storage import OutageError
from vlp.data.text import Tokenizer
from vlp.data.workers import Begin, Workers, ordered
from vlp.types import Batch, Reason

_LOST = {
    Reason.DECODE_CRASH: "its loader worker died twice",
    Reason.DECODE_TIMEOUT: "its loader worker hung twice; raise data.decode_timeout_s if it decodes, but slowly",
}
_SPLIT_AHEAD = 4  # shards of a split that are fetched while the first of them is read


class StepBatch(NamedTuple):
    """What one rank trains on in one optimizer step."""

    batches: tuple[Batch, ...]  # micro-batches of equal size
    step: int
    source: int  # number of the source that all ranks read in this step
    decode_s: float  # mean seconds that a clip took to decode


class Gate(Protocol):
    """Where the ranks meet before each step; all of them get the same answers."""

    def waiting(self, outage: Outage | None) -> bool:
        """Say that this rank has no batch yet; return whether to go on waiting."""
        ...

    def ready(self) -> bool:
        """Say that it has one; return whether the step begins."""
        ...

    def lost(self, error: OutageError) -> None:
        """Say that it will get none, because its storage was away for too long."""
        ...


class NoGate:
    """For a loader that serves one process."""

    def __init__(self) -> None:
        self._announce = Announcer()

    def waiting(self, outage: Outage | None) -> bool:
        """Say it in the log, and go on."""
        self._announce(outage)
        return True

    def ready(self) -> bool:
        """Go on."""
        return True

    def lost(self, error: OutageError) -> None:
        """Raise it."""
        raise error


class _TurnedBackError(Exception):
    """The gate is closed: there will be no step."""


class Part(NamedTuple):
    """One source of the mix."""

    reader: ClipReader
    plan: Order


class MicroBatches:
    """Work of the loader: job number j is micro-batch j % accumulate of step j // accumulate, for one rank."""

    def __init__(
        self,
        parts: Mapping[int, Part],
        *,
        schedule: Schedule,
        tokenizer: Tokenizer,
        accumulate: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`parts` by number of the source; those that the schedule never draws may be absent."""
        self.parts, self.schedule, self.tokenizer = dict(parts), schedule, tokenizer
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        plan = next(iter(self.parts.values())).plan
        self.num_clips = plan.global_batch // (world_size * accumulate)  # of a micro-batch
        self.buffer_bytes = self.num_clips * max(part.reader.sample_bytes for part in self.parts.values())

    def __call__(self, job: int, *, begin: Begin, skip: Mapping[int, Reason], buffer: Tensor) -> tuple[Batch, float]:
        """Return the micro-batch and the mean seconds of decoding one of its clips."""
        step, micro = divmod(job, self.accumulate)
        source, cursor = self.schedule.turn(step)
        reader, plan = self.parts[source]
        epoch, place = divmod(cursor, plan.num_steps)
        if reader.cache:
            reader.fetch_ahead(plan.upcoming(epoch, place, self.rank, self.world_size))
        find = partial(plan.rank_slots, epoch, place, self.rank, self.world_size)  # may open indexes
        slots = patiently(find, limit_s=reader.outage_s, tell=partial(_tell, begin, 0))
        ids = slots[micro * self.num_clips : (micro + 1) * self.num_clips]
        return _batch(reader, ids, self.tokenizer, epoch=epoch, begin=begin, skip=skip, buffer=buffer)


class SplitBatches:
    """Work of the loader: job number j is the j-th batch of one rank's share of a split, in the order of the index."""

    def __init__(
        self, reader: ClipReader, *, tokenizer: Tokenizer, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.reader, self.tokenizer, self.batch_size = reader, tokenizer, batch_size
        self.ids = range(rank, len(reader), world_size)
        self.num_batches = -(-len(self.ids) // batch_size)
        self.buffer_bytes = batch_size * reader.sample_bytes

    def __call__(self, job: int, *, begin: Begin, skip: Mapping[int, Reason], buffer: Tensor) -> Batch:
        """Return a batch; the last one may be shorter."""
        ids = self.ids[job * self.batch_size : (job + 1) * self.batch_size]
        if self.reader.cache:
            self.reader.fetch_ahead(self.reader.shards_from(ids[0], count=_SPLIT_AHEAD))
        return _batch(self.reader, ids, self.tokenizer, epoch=0, begin=begin, skip=skip, buffer=buffer)[0]


class StepLoader:
    """The StepBatches of `num_steps` steps from `start_step` on, or up to the one before which the gate is closed."""

    def __init__(
        self, work: MicroBatches, *, start_step: int, num_steps: int, workers: Workers, gate: Gate | None = None
    ) -> None:
        self._work, self._workers, self._gate = work, workers, gate or NoGate()
        self._steps = range(start_step, start_step + num_steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[StepBatch]:
        count = self._work.accumulate
        jobs = range(self._steps.start * count, self._steps.stop * count)
        with closing(ordered(self._work, jobs, self._workers, self._wait)) as results:
            for step in self._steps:
                try:
                    micro = [next(results) for _ in range(count)]
                except OutageError as error:
                    self._gate.lost(error)
                    return
                except _TurnedBackError:
                    return
                if not self._gate.ready():
                    return
                decode_s = sum(seconds for _, seconds in micro) / count
                yield StepBatch(
                    tuple(batch for batch, _ in micro), step, self._work.schedule.turn(step).source, decode_s
                )

    def _wait(self, outage: Outage | None) -> None:
        if not self._gate.waiting(outage):
            raise _TurnedBackError


class SplitLoader:
    """The batches of one rank's share of a split."""

    def __init__(self, work: SplitBatches, *, workers: Workers, waiting: Waiting | None = None) -> None:
        self._work, self._workers, self._waiting = work, workers, waiting

    def __len__(self) -> int:
        return self._work.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return ordered(self._work, range(len(self)), self._workers, self._waiting)


def workers_for(
    readers: Iterable[ClipReader], *, num_workers: int, decode_s: float, outage_s: float, memory_gib: float | None
) -> Workers:
    """Return the settings of a loader; each part of a remote sample is tried for a while between two signs of life."""
    far = any(is_remote(shard) for reader in readers for shard in reader.shards)
    stall_s = max(Workers().stall_s, decode_s) + far * len(PARTS) * RETRY.budget_s
    pin_memory = torch.cuda.is_available()
    sandbox = Sandbox(network=far, memory_bytes=None if memory_gib is None else int(memory_gib * 2**30))
    found = Workers(num_workers=num_workers, sandbox=sandbox, pin_memory=pin_memory)
    return found._replace(stall_s=stall_s, decode_s=decode_s, outage_s=outage_s)


def _tell(begin: Begin, number: int, outage: Outage) -> None:
    begin(number, outage=outage)


def _batch(
    reader: ClipReader,
    ids: Sequence[int] | np.ndarray,
    tokenizer: Tokenizer,
    *,
    epoch: int,
    begin: Begin,
    skip: Mapping[int, Reason],
    buffer: Tensor,
) -> tuple[Batch, float]:
    samples = []
    for number, sample_id in enumerate(map(int, ids)):
        begin(number)
        if number in skip:
            samples.append(reader.tombstone(sample_id, epoch, skip[number], _LOST.get(skip[number], "")))
        else:
            read = partial(reader.read, sample_id, epoch, loaded=partial(begin, number, loaded=True))
            tell = partial(_tell, begin, number)
            samples.append(patiently(read, limit_s=reader.outage_s, tell=tell))
    batch = collate(samples, tokenizer, shape=reader.shape, buffer=buffer)
    return batch, sum(sample.decode_s for sample in samples) / max(1, sum(sample.decode_s > 0 for sample in samples))
