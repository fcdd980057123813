"""P2: clips a second from shards to batches in the trainer: 8 frames of 224 x 224 a clip, 8 clips a batch, wall time.

Steady state: the first batches of every worker are not counted. vlp reads, checks, shuffles and tokenizes as in
training, the peers read in order. "Codec" is as many processes as workers that only decode the packets of vlp's plan.
"""

import multiprocessing
import statistics
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from corpus import Corpus, corpus
from decoding import Case
from fixtures import FPS, Clip, clips
from peer import Peer, PeerError, started
from reading import prepare

from vlp.data.fields import ClipReader, Clips
from vlp.data.loader import MicroBatches, Part, StepLoader
from vlp.data.mix import Schedule
from vlp.data.plan import Plan
from vlp.data.sampling import Segments
from vlp.data.text import Tokenizer, load_tokenizer, train_tokenizer
from vlp.data.transforms import CenterCrop
from vlp.data.workers import Workers

NUM_FRAMES, SIDE, BATCH = 8, 224, 8
SETS = {"256, GOP 12": ("256", 12, 512), "270p, GOP 30": ("270p", 30, 256)}
COUNT, SKIP, REPEATS = 20, 6, 3  # batches counted, batches of each worker that are not
MODULES = {"webdataset": "on_webdataset", "mosaicml": "on_mosaicml", "energon": "on_energon"}
PEERS = (("webdataset", "torchcodec"), ("webdataset", "decord"), ("mosaicml", "torchcodec"), ("energon", "torchcodec"))


def main(*, quick: bool = False, peers: bool = True) -> dict[str, Any]:
    """Return a row for each set and number of workers."""
    failures: dict[str, str] = {}
    rows = []
    with started(*(MODULES.items() if peers else ())) as (running, not_running):
        failures.update(not_running)
        sets = {"60 frames": ("270p", 12, 24)} if quick else SETS
        for name, (size, gop, num_samples) in sets.items():
            num_frames = 60 if quick else 300
            data = corpus(size, gop, num_samples=num_samples, num_frames=num_frames)
            (clip,) = clips(("h264",), (size,), (gop,), num_frames=num_frames)
            for workers in (1,) if quick else (1, 2):
                rates = _rates(data, clip, running, workers=workers, failures=failures, quick=quick)
                rows.append(_row(name, workers, rates))
                print(f"loading: {rows[-1]}", flush=True)
    return {
        **{f"does not run: {name}": error for name, error in failures.items()},
        "Clips a second": rows,
    }


def _rates(
    data: Corpus, clip: Clip, running: dict[str, Peer], *, workers: int, failures: dict[str, str], quick: bool
) -> dict[str, float]:
    """Return the median of each way, taken in turns."""
    case = Case(clip, NUM_FRAMES)
    skip, count, repeats = (1, 1, 1) if quick else (SKIP * workers, COUNT * workers, REPEATS)
    found: dict[str, list[float]] = {}
    where = {name: prepare(peer, data, failures) for name, peer in running.items()}
    for _ in range(repeats):
        found.setdefault("vlp", []).append(_vlp(data, workers=workers, skip=skip, count=count))
        found.setdefault("codec", []).append(_codec(case, workers=workers, seconds=0.2 if quick else 3.0))
        for peer, method in PEERS:
            if peer not in running:
                continue
            how = [method, *case.size, clip.num_frames / FPS]
            arguments = {"how": how, "workers": workers, "skip": skip, "count": count}
            try:
                rate = running[peer].call("batches", **where[peer], **arguments)
                found.setdefault(f"{peer} + {method}", []).append(rate)
            except PeerError as error:
                failures[f"{peer} + {method}"] = str(error)
    return {name: statistics.median(rates) for name, rates in found.items()}


def _row(name: str, workers: int, rates: dict[str, float]) -> dict[str, str]:
    peers = {way: rate for way, rate in rates.items() if way not in ("vlp", "codec")}
    best = f"{rates['vlp'] / max(peers.values()):.2f}" if peers else "-"
    return {
        "set": name,
        "workers": str(workers),
        **{way: f"{rate:.1f}" for way, rate in rates.items()},
        "vlp to the best peer": best,
        "vlp to codec": f"{rates['vlp'] / rates['codec']:.2f}",
    }


def _vlp(data: Corpus, *, workers: int, skip: int, count: int) -> float:
    work = batches_of(data)
    loader = StepLoader(work, start_step=0, num_steps=1 << 20, workers=Workers(num_workers=workers))
    with closing(iter(loader)) as steps:
        for step in islice(steps, skip):
            assert step.batches[0].valid.all()
        began = time.perf_counter()
        num_clips = sum(len(step.batches[0].frames) for step in islice(steps, count))
        return num_clips / (time.perf_counter() - began)


def batches_of(data: Corpus) -> MicroBatches:
    """Return the work of a loader over a corpus."""
    clips_ = Clips(Segments(num_frames=NUM_FRAMES), [CenterCrop(size=SIDE)], SIDE)
    reader = ClipReader(data.shards, clips=clips_, seed=0, source=0, train=True)
    plan = Plan(reader.counts, seed=0, num_lanes=BATCH, window_shards=4, global_batch=BATCH)
    schedule, tokenizer = Schedule([1.0], seed=0), _tokenizer(reader)
    return MicroBatches(
        {0: Part(reader, plan)}, schedule=schedule, tokenizer=tokenizer, accumulate=1, rank=0, world_size=1
    )


def _tokenizer(reader: ClipReader) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        train_tokenizer(reader.captions(100), vocab_size=200, path=path)
        return load_tokenizer(str(path), max_length=32)


def _codec(case: Case, *, workers: int, seconds: float) -> float:
    """Return clips a second of processes that only run the decoder."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return sum(pool.starmap(_decode_for, [(case, seconds)] * workers, chunksize=1))


def _decode_for(case: Case, seconds: float) -> float:
    began, times = time.perf_counter(), []
    while time.perf_counter() - began < seconds:
        times.append(case.codec()[0])
    return 1 / float(np.median(times))


if __name__ == "__main__":
    print(main())
