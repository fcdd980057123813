"""Resident memory of a loader worker over many decodes of all kinds of files, some of them damaged.

    python tests/decode_memory.py 10000

One real worker process reads batches of a shard, over and over, at random times, and says what memory it holds.
"""

import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import clips
from test_decode import PLANNED
from torch import Tensor

from vlp.data.fields import ClipReader, Clips
from vlp.data.loader import MicroBatches, Part
from vlp.data.mix import Schedule
from vlp.data.plan import Plan
from vlp.data.sampling import Segments
from vlp.data.shards import Raw, write_shards
from vlp.data.text import load_tokenizer, train_tokenizer
from vlp.data.transforms import RandomResizedCrop
from vlp.data.workers import Workers, ordered
from vlp.types import Batch, Reason

BOUND_MIB = 8  # growth after the first fifth; a clip of this harness has 0.4 MiB
BATCH, FRAMES, SIZE = 6, 8, 128
NAMES = ("b_frames", "hevc", "vp9_webm", "av1", "mpeg4_mp4", "mkv", "mpegts", "rotated", "open_gop", "fragmented")
KEPT: list[Tensor] = []


class Memory(NamedTuple):
    """MiB resident of a worker."""

    decodes: int
    before: float  # most, in the second tenth of the run
    after: float  # most, in the last tenth

    @property
    def growth(self) -> float:
        return self.after - self.before


class Resident:
    """The work of a loader; its result is what memory the worker holds afterwards, and how many clips were decoded."""

    def __init__(self, work: MicroBatches, *, keep: bool) -> None:
        self.work, self.keep, self.buffer_bytes = work, keep, work.buffer_bytes

    def __call__(
        self, job: int, *, begin: Callable[[int], None], skip: Mapping[int, Reason], buffer: Tensor
    ) -> tuple[int, int]:
        batch: Batch = self.work(job, begin=begin, skip=skip, buffer=buffer)[0]
        if self.keep:
            KEPT.append(batch.frames.clone())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), int(batch.valid.sum())


def run(folder: Path, *, num_decodes: int, keep: bool = False) -> Memory:
    """Decode so many clips in a spawned worker; `keep` keeps every batch, as a leak would."""
    work, num_jobs = Resident(_batches(folder), keep=keep), num_decodes // BATCH
    results = list(ordered(work, range(num_jobs), Workers(num_workers=1, start_method="spawn")))
    mib = [resident / (1 << 20) for resident, _ in results]
    tenth = max(1, num_jobs // 10)
    return Memory(sum(decoded for _, decoded in results), max(mib[tenth : 2 * tenth]), max(mib[-tenth:]))


def _batches(folder: Path) -> MicroBatches:
    files = {name: PLANNED[name]() for name in NAMES}
    files["cut"] = clips.header_first(files["b_frames"])[:-500]
    files["damaged"] = clips.damaged(files["b_frames"], 13)
    raws = [Raw(name, data, "mp4", {"captions": [f"a clip named {name}"]}) for name, data in files.items()]
    shards = write_shards(raws, os.fspath(folder), prefix="train", max_samples_per_shard=len(raws))
    how = Clips(Segments(num_frames=FRAMES), [RandomResizedCrop(size=SIZE)], SIZE)
    reader = ClipReader(shards, clips=how, seed=0, source=0, train=True)
    plan = Plan(reader.counts, seed=0, num_lanes=1, window_shards=1, global_batch=BATCH)
    train_tokenizer(reader.captions(9), vocab_size=100, path=folder / "tokenizer.json")
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"), max_length=16)
    parts = {0: Part(reader, plan)}
    return MicroBatches(
        parts, schedule=Schedule([1.0], seed=0), tokenizer=tokenizer, accumulate=1, rank=0, world_size=1
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        memory = run(Path(directory), num_decodes=int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    print(
        f"{memory.decodes:,} decodes: {memory.before:.1f} MiB resident in the second tenth of the run, "
        f"{memory.after:.1f} MiB in the last; growth {memory.growth:.1f} MiB, allowed are {BOUND_MIB}"
    )
    sys.exit(memory.growth > BOUND_MIB)
