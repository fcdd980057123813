"""Kill and resume, again and again: ranks with their loader workers die by SIGKILL at any moment, and go on from the
committed step with another number of ranks and workers. What was committed must be what an unbroken run reads.

    python tests/kill_resume.py 1000        # cycles; a seed may follow

A rank reads its part of a step, writes down what it got, and waits for the others; then rank 0 commits the step.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from clips import clip

from vlp.data.datamodule import VideoTextData
from vlp.data.fields import Shards
from vlp.data.sampling import Fps
from vlp.data.shards import Raw, write_shards
from vlp.data.text import load_tokenizer, train_tokenizer
from vlp.data.transforms import RandomResizedCrop
from vlp.types import Batch

NUM_SAMPLES, BATCH, LANES, EPOCH_STEPS = 45, 12, 12, 4
WORLDS, WORKERS = (1, 2, 3, 4), (0, 1, 2, 3)


class Count(NamedTuple):
    """What the cycles saw."""

    cycles: int
    steps: int  # committed
    lost: int  # samples of committed steps that were not read
    repeated: int  # read more than once in a committed step, or not of this step
    changed: int  # read with other frames, times, crops or words


def run(directory: Path, *, cycles: int, seed: int) -> Count:
    """Kill `cycles` times and compare everything that was committed with an unbroken run."""
    draw, shards = random.Random(seed), _shards(directory)
    cursor, seen = directory / "cursor", directory / "ledger"
    seen.mkdir()
    cursor.write_text("0")
    for _ in range(cycles):
        start = int(cursor.read_text())
        _attempt(shards, directory, start=start, world=draw.choice(WORLDS), workers=draw.choice(WORKERS), draw=draw)
    steps = int(cursor.read_text())
    expected = {step: found for step, found in enumerate(_read(shards, directory, steps))}
    lost = repeated = changed = 0
    for step in range(steps):
        ledger = [line.split() for path in seen.glob(f"{step}-*") for line in path.read_text().splitlines()]
        ids = [sample for sample, _ in ledger]
        lost += len(expected[step].keys() - set(ids))
        repeated += len(ids) - len(set(ids) & expected[step].keys())
        changed += sum(expected[step].get(sample, digest) != digest for sample, digest in ledger)
    return Count(cycles, steps, lost, repeated, changed)


def _attempt(shards: list[str], directory: Path, *, start: int, world: int, workers: int, draw: random.Random) -> None:
    """Let the ranks commit a few steps, or none, and kill them and whatever they have started at a random moment."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(world)
    ranks = [
        context.Process(target=_rank, args=(rank, world, workers, start, shards, directory, barrier))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    wanted, cursor = start + draw.randint(0, 3), directory / "cursor"
    while int(cursor.read_text()) < wanted and all(process.is_alive() for process in ranks):
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.3 if wanted == start else 0.05))
    for process in draw.sample(ranks, len(ranks)):
        os.killpg(process.pid, signal.SIGKILL) if _leads(process.pid) else process.kill()
    for process in ranks:
        process.join()


def _leads(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _rank(rank: int, world: int, workers: int, start: int, shards: list[str], directory: Path, barrier) -> None:
    os.setpgrp()  # so that its loader workers can be killed with it
    data = _data(shards, directory, workers)
    for step in data.train_loader(start_step=start, num_steps=10_000, rank=rank, world_size=world):
        lines = "".join(f"{sample} {digest}\n" for batch in step.batches for sample, digest in _samples(batch))
        for stale in (directory / "ledger").glob(f"{step.step}-{rank}of*"):
            stale.unlink()  # of an attempt that died before the step was committed
        barrier.wait()
        (directory / "ledger" / f"{step.step}-{rank}of{world}").write_text(lines)
        barrier.wait()
        if rank == 0:
            for stale in (directory / "ledger").glob(f"{step.step}-*"):
                if not stale.name.endswith(f"of{world}"):
                    stale.unlink()
            (directory / "cursor.new").write_text(str(step.step + 1))
            os.replace(directory / "cursor.new", directory / "cursor")
        barrier.wait()


def _read(shards: list[str], directory: Path, steps: int) -> Iterator[dict[str, str]]:
    """Yield what one process without workers reads in each step."""
    data = _data(shards, directory, 0)
    for step in data.train_loader(start_step=0, num_steps=steps, rank=0, world_size=1):
        yield {sample: digest for batch in step.batches for sample, digest in _samples(batch)}


def _samples(batch: Batch) -> Iterator[tuple[str, str]]:
    """Yield the id and a digest of all that was drawn for each sample that is there."""
    for row in batch.valid.nonzero().flatten().tolist():
        real, words = batch.frame_mask[row], batch.text_mask[row]
        parts = (batch.frames[row][real], batch.times_s[row][real], batch.text_ids[row][words], batch.key[row])
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            digest.update(part.contiguous().numpy().tobytes())
        yield str(int(batch.sample_id[row])), digest.hexdigest()


def _shards(directory: Path) -> list[str]:
    videos = [clip(3 + number % 5) for number in range(5)]
    samples = [
        Raw(f"clip{n}", videos[n % 5], "mp4", {"captions": [f"clip {n} " + "word " * (n % 7), f"the other of {n}"]})
        for n in range(NUM_SAMPLES)
    ]
    train_tokenizer(
        (text for raw in samples for text in raw.meta["captions"]), vocab_size=200, path=directory / "t.json"
    )
    return write_shards(samples, str(directory / "shards"), prefix="s", max_samples_per_shard=7)


def _data(shards: list[str], directory: Path, workers: int) -> VideoTextData:
    torch.set_num_threads(1)
    sampling, crop = Fps(num_frames=4, fps=30.0), [RandomResizedCrop(size=16, scale_min=0.3)]
    return VideoTextData(
        sources={"s": Shards(train=shards)},
        weights={"s": 1.0},
        batch_size=BATCH,
        accumulate=1,
        num_lanes=LANES,
        window_shards=2,
        bucket_steps=3,
        num_workers=workers,
        seed=5,
        sampling_train=sampling,
        sampling_test=sampling,
        transforms_train=crop,
        transforms_test=crop,
        short_side=24,
        make_tokenizer=lambda captions: load_tokenizer(str(directory / "t.json"), max_length=16),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(run(Path(place), cycles=int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0))
