"""The shards that the loading benches read: copies of one clip under different keys, written by vlp's own writer."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fixtures import CACHE, VERSION, clips

from vlp.data.probe import probe
from vlp.data.shards import Raw, write_shards
from vlp.data.storage import locked

SHARDS = 8


class Corpus(NamedTuple):
    name: str
    shards: list[str]
    num_samples: int
    num_bytes: int  # of the shards


def corpus(size: str, gop: int, *, num_samples: int, num_frames: int = 300) -> Corpus:
    """Return shards of `num_samples` H.264 clips of a size and GOP; they are written on first use."""
    (clip,) = clips(("h264",), (size,), (gop,), num_frames=num_frames)
    folder = CACHE / f"corpus-v{VERSION}-{clip.path.stem}-{num_frames}-{num_samples}"
    with locked(f"{folder}.lock"):
        if not folder.exists():
            _write(clip.path.read_bytes(), folder, num_samples)
    shards = sorted(map(str, folder.glob("*.tar")))
    return Corpus(clip.name, shards, num_samples, sum(Path(shard).stat().st_size for shard in shards))


def _write(data: bytes, folder: Path, num_samples: int) -> None:
    half, per_shard = folder.with_suffix(".part"), -(-num_samples // SHARDS)
    shutil.rmtree(half, ignore_errors=True)
    write_shards(_samples(data, num_samples), str(half), prefix="train", max_samples_per_shard=per_shard)
    half.rename(folder)


def _samples(data: bytes, count: int) -> Iterator[Raw]:
    facts = probe(data)
    for number in range(count):
        captions = [f"a clip with the number {number} in which a picture grows and a smaller one moves"]
        yield Raw(f"{number:06d}", data, "mp4", {"captions": captions}, facts)
