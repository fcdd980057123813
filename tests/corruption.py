"""Damage without end: shards and clips that are cut, flipped, swapped, replaced or forged, read as training reads them.

    python tests/corruption.py shards 10000 [SEED]
    python tests/corruption.py clips 5000 [SEED]

Each damaged file is a job of the real loader workers (`vlp.data.workers`): it is indexed, opened, and every sample is
read and decoded there, so that a crash or a hang costs a worker and shows. The oracle knows the undamaged bytes. A
sample must come out as it was, or be named with a reason; anything else is a silent loss, and there may be none.

What a *fresh* index of a damaged shard cannot see is counted apart ("unseen"): the payload of a tar member has no
checksum before the first index. Then the archive must be one that an independent reader takes for the same members, the
damage must lie inside the blocks of that sample, and what is read must be what was indexed.
"""

import functools
import io
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from clips import clip, header_first, image, rotated, with_edits
from mutations import BLOCK, CLIP_MUTATIONS, SHARD_MUTATIONS, headers, mutated

from vlp.data import fields, storage
from vlp.data.columns import PARTS, IndexFileError
from vlp.data.fields import ClipReader, Clips
from vlp.data.index import ShardIndex, build_index, check_shard, index_url, open_index, read_part
from vlp.data.sampling import Segments
from vlp.data.shards import Raw, write_shards
from vlp.data.tar import TarError
from vlp.data.transforms import CenterCrop
from vlp.data.workers import Workers, ordered
from vlp.types import Reason

DEADLINE_S = 10.0  # for a sample
MAX_GROWTH = 512 << 20  # bytes of resident memory that a worker may need above what it began with
CLIPS = Clips(Segments(num_frames=3), [CenterCrop(size=16)], short_side=24)
CAPTIONS = ["a red square rises", "zwei blaue Kreise \u2014 sinking", "three", "the last of them"]

Content = dict[str, dict[str, bytes]]  # key -> part -> bytes


class Found(NamedTuple):
    """What became of one damaged file."""

    counts: Counter
    wrong: list[str]  # each a silent loss, an exception or a sample that was blamed without reason
    growth: int  # bytes of resident memory of the worker above its start


@functools.cache
def videos() -> list[tuple[str, bytes]]:
    """Small clips of each container and codec that training reads: (extension, bytes)."""
    size, b_frames = (48, 32), {"g": "6", "bf": "2"}
    plain = clip(13, size=size, options=b_frames)
    return [
        ("mp4", plain),
        ("mp4", header_first(plain)),
        ("mp4", clip(7, size=size, options={"g": "3"}, layout="av")),
        ("mp4", with_edits(plain, (200, 80))),
        ("mp4", rotated(plain, 90)),
        ("mp4", clip(6, size=size, codec="mpeg4")),
        (
            "mp4",
            clip(8, codec="libx265", options={"x265-params": "log-level=none:pools=1"}),
        ),  # below 64 lines x265 writes past its memory
        ("mp4", clip(8, size=size, pts=[0, 20, 30, 90, 100, 240, 260, 300])),
        ("mkv", clip(8, size=size, container="matroska")),
        ("webm", clip(8, size=size, codec="libvpx-vp9", container="webm", options={"cpu-used": "8"})),
        ("webm", clip(6, size=size, codec="libvpx", container="webm", options={"cpu-used": "8"})),
        ("avi", clip(8, size=size, codec="mpeg4", container="avi")),
        ("mp4", clip(9, size=size, container="mpegts")),
        ("jpg", image("mjpeg")),
        ("png", image("png")),
        ("webp", image("libwebp")),
    ]


@functools.cache
def pristine() -> list[bytes]:
    """Whole shards as different tools write them: vlp itself, GNU tar with long names, pax with times, plain ustar."""
    shards = []
    with tempfile.TemporaryDirectory() as place:
        raws = [Raw(f"s{i}", videos()[i][1], "mp4", {"captions": [text]}) for i, text in enumerate(CAPTIONS)]
        (path,) = write_shards(raws, place, prefix="x", max_samples_per_shard=9)
        shards.append(Path(path).read_bytes())
    long = "folder/" + "n" * 110
    forms = [(tarfile.GNU_FORMAT, f"{long}{{}}", {}), (tarfile.USTAR_FORMAT, "part/{}", {})]
    forms.append((tarfile.PAX_FORMAT, "\u00fc{}", {"mtime": "1700000000.5"}))
    for form, name, records in forms:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as writer:
            for i, text in enumerate(CAPTIONS):
                for kind, data in (("mp4", videos()[(i + 4) % 8][1]), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"{name.format(i)}.{kind}")
                    info.size, info.pax_headers = len(data), records
                    writer.addfile(info, io.BytesIO(data))
        shards.append(file.getvalue())
    return shards


def listed(data: bytes) -> list[tuple[str, int, int]]:
    """Return (name, offset, size) of the regular files that the standard library reads before it gives up."""
    found = []
    errors = (tarfile.TarError, ValueError, EOFError, OSError, OverflowError)
    with suppress(*errors), tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for info in archive:
            found += [(info.name, info.offset_data, info.size)] if info.isfile() else []
    return found


def content(data: bytes) -> Content:
    found: Content = {}
    for name, offset, size in listed(data):
        stem, _, kind = name.rpartition(".")
        found.setdefault(stem, {})[kind if kind in ("txt", "json") else "video"] = data[offset : offset + size]
    return found


def blocks(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """Return the byte ranges of all that belongs to a sample: headers, extended headers, padded data."""
    edges, found, at = headers(data), {}, 0
    for name, offset, size in listed(data):
        end = offset + -(-size // BLOCK) * BLOCK
        start = next(edge for edge in edges if edge >= at)
        found.setdefault(name.rpartition(".")[0], []).append((start, end))
        at = end
    return found


class Damage:
    """Work of the loader: job number j is the damaged file number j of a seed."""

    buffer_bytes = 0

    def __init__(self, place: str, *, seed: int) -> None:
        self.place, self.seed, self.began = place, seed, 0

    def __call__(self, job, *, begin, skip, buffer) -> Found:
        self.began = self.began or resident()
        begin(0)
        if 0 in skip:
            return Found(Counter({skip[0].name.lower(): 1}), [f"{job}: the worker was lost: {skip[0].name}"], 0)
        rng, path = random.Random(f"{self.seed}/{job}"), os.path.join(self.place, f"{os.getpid()}.tar")
        fields._index.cache_clear()
        storage.forget(path)
        counts, wrong = self.examine(rng, path)
        growth = resident() - self.began
        return Found(counts, [f"{job}: {text}" for text in wrong], growth)

    def examine(self, rng: random.Random, path: str) -> tuple[Counter, list[str]]:
        raise NotImplementedError


class DamagedShards(Damage):
    """A shard that was damaged before its first index, and one that was damaged behind it."""

    def examine(self, rng: random.Random, path: str) -> tuple[Counter, list[str]]:
        whole = rng.choice(pristine())
        name, damaged = mutated(whole, SHARD_MUTATIONS, rng)
        counts, wrong = Counter(), []
        for part in (fresh, behind):
            seen, errors = part(whole, damaged, path, rng)
            counts += Counter({f"{part.__name__} {key}": n for key, n in seen.items()})
            wrong += [f"{name}, {part.__name__}: {text}" for text in errors]
        return counts, wrong


def fresh(whole: bytes, damaged: bytes, path: str, rng: random.Random) -> tuple[Counter, list[str]]:
    """Index a damaged shard, by one of the two policies, and read what the index says is there."""
    Path(path).write_bytes(damaged)
    keep = rng.random() < 0.5
    try:
        index = build_index(path, on_damage="keep" if keep else "refuse")
        index.save(index_url(path))
        index = open_index(path)
    except TarError as error:
        refused = str(error).startswith(f"{path}: byte ")
        return Counter({"refused": len(content(whole))}), [] if refused else [f"a message without a place: {error}"]
    usable = [index.key(row) for row in range(len(index)) if index.status(row) == Reason.OK]
    rows = {index.key(row): row for row in reversed(range(len(index)))}  # of equal keys the first: the others are named
    taken = {(part.offset, part.size) for row in rows.values() for name in PARTS if (part := index.part(row, name))}
    agreed = {place[1:] for place in listed(damaged)} >= taken
    counts, wrong = Counter(), [f"{key}: usable twice" for key, num in Counter(usable).items() if num > 1]
    where = blocks(whole)
    for key, parts in content(whole).items():
        touched = any(whole[low:high] != damaged[low:high] for low, high in where[key])
        outcome = _fresh_outcome(index, rows.get(key), parts)
        if outcome == "partial" or (outcome in ("unseen", "missing") and not (touched and agreed)):
            wrong.append(f"{key}: {outcome} without a word (touched {touched}, others agree {agreed})")
        counts[outcome.replace("missing", "unseen")] += 1
    wrong += [error for row in rows.values() for error in _readable(index, row, damaged)]
    return counts, wrong


def _fresh_outcome(index: ShardIndex, row: int | None, parts: dict[str, bytes]) -> str:
    if row is None:
        return "named" if index.info.damage else "missing"
    if index.status(row) != Reason.OK:
        assert index.detail(row), "a reason has a detail"
        return "named"
    found = {name: read_part(index, row, name) for name in PARTS if index.part(row, name)}
    if index.info.damage and row == len(index) - 1 and found.keys() < parts.keys():
        return "partial"  # cut in the middle, and taken for a whole one; before that no reader can know of a member
    return "identical" if found == parts else "unseen"


def _readable(index: ShardIndex, row: int, damaged: bytes) -> list[str]:
    """What an index calls OK is read back as it was indexed."""
    if index.status(row) != Reason.OK:
        return []
    places = [part for name in PARTS if (part := index.part(row, name))]
    same = all(zlib.crc32(damaged[p.offset : p.offset + p.size]) == p.crc32 for p in places)
    return [] if same else [f"{index.key(row)}: other bytes than were indexed"]


def behind(whole: bytes, damaged: bytes, path: str, rng: random.Random) -> tuple[Counter, list[str]]:
    """Damage a shard that has a valid index: before it is opened, or under a reader that has it open."""
    Path(path).write_bytes(whole)
    build_index(path).save(index_url(path))
    before = rng.random() < 0.3
    reader = None if before else _reader(path)
    expected = [_sample(_reader(path), row) for row in range(4)]
    with open(path, "r+b") as file:  # the same file, as a disk that rots or a writer that truncates
        file.write(damaged)
        file.truncate()
    storage.forget(path)
    fields._index.cache_clear()
    index = ShardIndex.load(index_url(path), shard=path)
    try:
        reader = reader or _reader(path)
    except IndexFileError as error:
        counts = Counter({"refused": len(expected)})
        return counts, [] if len(damaged) != len(whole) else [f"refused though its size is right: {error}"]
    counts, wrong, intact = Counter(), [], {row: _intact(index, row, damaged) for row in range(len(index))}
    for row, original in enumerate(expected):
        status, found = _sample(reader, row)
        counts["identical" if status == Reason.OK else f"named {status.name.lower()}"] += 1
        if status == Reason.OK and found != original[1]:
            wrong.append(f"{index.key(row)}: other frames, times or words without a word")
        if (status == Reason.OK) != intact[row] and len(damaged) == len(whole):
            wrong.append(f"{index.key(row)}: {status.name}, though intact is {intact[row]}")
    wrong += _check_errors(index, path, intact, same=damaged == whole)
    return counts, wrong


def _reader(path: str) -> ClipReader:
    return ClipReader([path], clips=CLIPS, seed=3, source=0, train=True)


def _sample(reader: ClipReader, row: int) -> tuple[Reason, tuple]:
    sample = reader.read(row, 0)
    return sample.status, (sample.frames.tobytes(), sample.times_s.tobytes(), sample.texts.first)


def _intact(index: ShardIndex, row: int, damaged: bytes) -> bool:
    return all(
        zlib.crc32(damaged[p.offset : p.offset + p.size]) == p.crc32 and p.offset + p.size <= len(damaged)
        for name in PARTS
        if (p := index.part(row, name))
    )


def _check_errors(index: ShardIndex, path: str, intact: dict[int, bool], *, same: bool) -> list[str]:
    """`--check` names exactly the samples that are damaged."""
    lines = check_shard(path)
    named = {line.split(":")[0] for line in lines if " part: " in line}
    damaged = {index.key(row) for row, whole in intact.items() if not whole}
    wrong = [] if named == damaged else [f"--check names {sorted(named)}, damaged are {sorted(damaged)}"]
    return wrong + ([] if bool(lines) != same else [f"--check says {lines} of a shard that is as it was: {same}"])


class DamagedClips(Damage):
    """A damaged clip between two whole ones: indexed as it is, and put in the place of a whole one afterwards."""

    def examine(self, rng: random.Random, path: str) -> tuple[Counter, list[str]]:
        number = rng.randrange(len(videos()))
        extension, whole = videos()[number]
        name, damaged = mutated(whole, CLIP_MUTATIONS, rng)
        extension = rng.choice([extension, "mp4"])
        counts, wrong = Counter(), []
        one, two = ("mp4", videos()[0][1]), ("mp4", videos()[8][1])
        shard = _written([one, (extension, damaged), two], path)
        reader = _reader(shard)
        status, found = _sample(reader, 1)
        again, same = _sample(_reader(shard), 1)
        counts[f"indexed {status.name.lower()}"] += 1
        if status == Reason.OK and (np.frombuffer(found[0], np.uint8).shape != (3 * 16 * 16 * 3,)):
            wrong.append(f"{name} of clip {number}: frames of another shape")
        if damaged == whole and status != Reason.OK:
            wrong.append(f"{name} of clip {number}: {status.name} though nothing is damaged")
        if (status, found) != (again, same):
            wrong.append(f"{name} of clip {number}: read twice, it differs ({status.name}, {again.name})")
        wrong += [f"{name} of clip {number}: took sample {row} with it" for row in (0, 2) if _changed(shard, row)]
        return counts + _in_place(whole, damaged, extension, path, wrong), wrong


@functools.cache
def _neighbours(place: str) -> list[tuple[Reason, tuple]]:
    shard = _written([("mp4", videos()[0][1]), ("mp4", videos()[1][1]), ("mp4", videos()[8][1])], place)
    return [_sample(_reader(shard), row) for row in range(3)]


def _changed(shard: str, row: int) -> bool:
    expected = _neighbours(os.path.join(os.path.dirname(shard), f"n{os.getpid()}.tar"))[row]
    return _sample(_reader(shard), row) != expected


def _written(clips: list[tuple[str, bytes]], path: str) -> str:
    raws = [Raw(f"c{i}", data, extension, {"captions": [f"clip {i}"]}) for i, (extension, data) in enumerate(clips)]
    folder, prefix = os.path.split(path)
    fields._index.cache_clear()
    (shard,) = write_shards(raws, folder, prefix=prefix.removesuffix(".tar"), max_samples_per_shard=9)
    return shard


def _in_place(whole: bytes, damaged: bytes, extension: str, path: str, wrong: list[str]) -> Counter:
    """Write the damaged bytes over the whole clip of an indexed shard; only their checksum can tell."""
    shard = _written([(extension, whole)], path)
    place = open_index(shard).part(0, "video")
    assert place is not None
    patch = (damaged + bytes(len(whole)))[: len(whole)]
    expected = _sample(_reader(shard), 0)
    with open(shard, "r+b") as file:
        file.seek(place.offset)
        file.write(patch)
    status, found = _sample(_reader(shard), 0)
    if (status, found) != expected and status != Reason.CHECKSUM:
        wrong.append(f"written over: {status.name}, not CHECKSUM")
    if patch != whole and status == Reason.OK:
        wrong.append("written over, and read without a word")
    return Counter({f"written over {status.name.lower()}": 1})


def resident() -> int:
    """Return the largest resident memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(work: type[Damage], *, count: int, seed: int, workers: int = 2) -> Found:
    """Read `count` damaged files in real loader workers."""
    videos(), pristine()
    counts, wrong, growth = Counter(), [], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        settings = Workers(workers, stall_s=DEADLINE_S, max_restarts=count, start_method="fork")
        for found in ordered(work(place, seed=seed), range(count), settings):
            counts, wrong, growth = counts + found.counts, wrong + found.wrong, max(growth, found.growth)
    if growth > MAX_GROWTH:
        wrong.append(f"a worker took {growth >> 20} MiB more than at its start")
    return Found(counts, wrong, growth)


KINDS = {"shards": DamagedShards, "clips": DamagedClips}


def main(arguments: list[str]) -> int:
    """Run the sweep of the command line; 1 if anything was wrong."""
    work, count = KINDS[arguments[0]], int(arguments[1])
    seed, began = int(arguments[2]) if len(arguments) > 2 else 0, time.monotonic()
    found = run(work, count=count, seed=seed)
    for name, number in sorted(found.counts.items()):
        print(f"{number:8} {name}")
    print("\n".join(found.wrong[:50]))
    took = time.monotonic() - began
    print(
        f"{count} damaged {arguments[0]}, seed {seed}, {took:.0f} s: wrong {len(found.wrong)}, "
        f"memory of a worker +{found.growth >> 20} MiB"
    )
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
