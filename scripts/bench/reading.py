"""P3: samples a second (video, caption) in shuffled order, in one process, from shards in the page cache, in CPU time.

"Handed over" is what a reader returns; litdata returns a view of its mapped file of which no byte has been read. "Read
once" adds a crc32 of the video by whoever asked, as any decoder reads it; vlp has done that itself, as its check.
"""

import statistics
import time
from itertools import islice
from typing import Any

from corpus import Corpus, corpus
from fixtures import CACHE
from peer import Peer, PeerError, started

from vlp.data.fields import ClipReader, Clips
from vlp.data.index import meta_of, read_part
from vlp.data.plan import PADDING, Plan
from vlp.data.sampling import Segments
from vlp.data.transforms import CenterCrop

NUM_SAMPLES, BATCH, REPEATS = 512, 64, 5
PEERS = {"litdata": "on_litdata", "webdataset": "on_webdataset", "mosaicml": "on_mosaicml", "energon": "on_energon"}
FORMATS = ("litdata", "mosaicml", "energon")  # that read files of their own


def main(*, quick: bool = False, peers: bool = True) -> dict[str, Any]:
    """Return a row for each reader."""
    small = {"num_samples": 64, "num_frames": 60}
    data = corpus("270p", 12, **small) if quick else corpus("256", 12, num_samples=NUM_SAMPLES)
    count = 4 * data.num_samples
    with started(*(PEERS.items() if peers else ())) as (running, failures):
        rates: dict[str, tuple[list[float], list[float]]] = {"vlp": ([], [])}
        prepared = {name: prepare(peer, data, failures) for name, peer in running.items()}
        for turn in range(1 if quick else REPEATS):
            ours = _vlp(data, count, seed=turn)
            rates["vlp"][0].append(ours)
            rates["vlp"][1].append(ours)
            for name, where in prepared.items():
                try:
                    for touch in (False, True):
                        rate = running[name].call("samples", **where, count=count, touch=touch)
                        rates.setdefault(name, ([], []))[touch].append(rate)
                except PeerError as error:
                    failures[name] = str(error)
            print(f"reading: turn {turn + 1}, vlp {ours:.0f} samples/s", flush=True)
    medians = {name: [statistics.median(column) for column in both] for name, both in rates.items() if both[1]}
    return {
        "samples": f"{data.num_samples} of {data.num_bytes / data.num_samples / 1e6:.2f} MB, {len(data.shards)} shards",
        **{f"does not run: {name}": error for name, error in failures.items()},
        "Samples a second": [
            {
                "reader": name,
                "handed over": f"{handed:,.0f}",
                "read once": f"{once:,.0f}",
                "vlp is so many times as fast, read once": f"{medians['vlp'][1] / once:.2f}",
            }
            for name, (handed, once) in medians.items()
        ],
    }


def prepare(peer: Peer, data: Corpus, failures: dict[str, str]) -> dict[str, Any]:
    """Return where a peer reads the corpus, in the arguments of its calls; what it needs is written on first use."""
    if peer.name not in FORMATS:
        return {"shards": data.shards}
    folder = CACHE / f"{peer.name}-{data.num_samples}-{data.num_bytes}"
    try:
        peer.call("prepare", shards=data.shards, folder=str(folder))
    except PeerError as error:
        failures[peer.name] = str(error)
    return {"folder": str(folder)}


def _vlp(data: Corpus, count: int, *, seed: int) -> float:
    """Read as `ClipReader` does, without decoding."""
    clips = Clips(Segments(num_frames=8), [CenterCrop(size=224)], 224)
    reader = ClipReader(data.shards, clips=clips, seed=seed, source=0, train=True)
    plan = Plan(reader.counts, seed=seed, num_lanes=8, window_shards=4, global_batch=BATCH)
    ids = (int(i) for turn in range(1 << 30) for i in plan.step(*divmod(turn, plan.num_steps)) if i != PADDING)
    for sample_id in islice(ids, len(reader)):
        _read(reader, sample_id)
    began = time.process_time()
    for sample_id in islice(ids, count):
        _read(reader, sample_id)
    return count / (time.process_time() - began)


def _read(reader: ClipReader, sample_id: int) -> tuple[str, bytes]:
    index, row = reader._locate(sample_id)
    return meta_of(index, row)["captions"][0], read_part(index, row, "video")


if __name__ == "__main__":
    print(main())
