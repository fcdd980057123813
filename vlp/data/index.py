"""The index beside a shard: where each part of each sample lies, its checksum, and what its video is.

NAME.tar has NAME.index, see `vlp.data.columns`. Reading a tar says neither how many samples there should be nor whether
one is damaged, so training opens shards through their index only. `python -m vlp.data.index URL...` makes and checks
indexes, of foreign shards too; a shard is never rewritten.
"""

import argparse
import hashlib
import json
import mmap
import os
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np

from vlp.data import storage
from vlp.data.columns import PARTS, IndexFileError, Info, Part, dump, parse
from vlp.data.meta import MetaError, parse_meta
from vlp.data.probe import LIMITS, Limits, VideoFacts
from vlp.data.rows import PART_OF, Rows, split_name
from vlp.data.tar import TarError, members
from vlp.types import Reason, SampleError

EXIT_OK, EXIT_DAMAGED, EXIT_UNWRITABLE, EXIT_USAGE = 0, 65, 73, 78

_CHUNK = 4 << 20  # bytes read at once where only a checksum is wanted


class ShardIndex:
    """The rows of a shard, OK or not. `columns` holds them as arrays, for whoever needs all rows at once.

    Args:
        shard: URL of the shard.
        info: of the shard as a whole.
        columns: arrays by name, as SCHEMA and RAGGED of `vlp.data.columns` describe them.
    """

    def __init__(self, shard: str, info: Info, columns: Mapping[str, np.ndarray]) -> None:
        self.shard, self.info, self.columns = shard, info, columns

    def __len__(self) -> int:
        return self.info.count

    def key(self, row: int) -> str:
        return self._ragged("key", row).tobytes().decode()

    def status(self, row: int) -> Reason:
        return Reason(self.columns["status"][row])

    def detail(self, row: int) -> str:
        """Return one line on why the row is not OK, "" if it is."""
        return self._ragged("detail", row).tobytes().decode()

    def part(self, row: int, name: str) -> Part | None:
        """Return where the part "video", "txt" or "json" of a sample lies, None if it has none."""
        at = (row, PARTS.index(name))
        if self.columns["part_size"][at] < 0:
            return None
        return Part(*(int(self.columns[column][at]) for column in ("part_offset", "part_size", "part_crc")))

    def extension(self, row: int) -> str:
        """Return the lower-case extension of the video part, "" if there is none."""
        return self.info.words[self.columns["extension"][row]]

    def facts(self, row: int) -> VideoFacts | None:
        """Return what the probe found; None if it failed."""
        c = self.columns
        if not c["width"][row]:
            return None
        return VideoFacts(
            width=int(c["width"][row]),
            height=int(c["height"][row]),
            num_frames=int(c["num_frames"][row]),
            fps=float(c["fps"][row]),
            duration_s=float(c["duration_s"][row]),
            rotation=int(c["rotation"][row]),
            codec=self.info.words[c["codec"][row]],
            start_s=float(c["start_s"][row]),
            key_frames=self._ragged("key_frames", row),
        )

    def num_caption_chars(self, row: int) -> int:
        """Return the length of the longest caption."""
        return int(self.columns["num_caption_chars"][row])

    def counts(self) -> dict[Reason, int]:
        """Return how many rows have each status, without those that none has."""
        numbers = np.bincount(self.columns["status"], minlength=len(Reason))
        return {reason: int(numbers[reason]) for reason in Reason if numbers[reason]}

    def _ragged(self, name: str, row: int) -> np.ndarray:
        ends = self.columns[f"{name}_ends"]
        row = range(len(self))[row]
        return self.columns[f"{name}_values"][ends[row - 1] if row else 0 : ends[row]]

    def save(self, path: str) -> None:
        """Write the index to a temporary file, sync it and rename it to `path`, so that no reader sees half of it."""
        with storage.replacing(path) as file:
            file.write(dump(self.info, self.columns))

    @classmethod
    def load(cls, path: str, *, shard: str | None = None) -> "ShardIndex":
        """Map an index, which takes a descriptor until it is dropped; `shard` is by default the one beside it.

        Raises:
            IndexFileError: the file is missing, damaged, of another version, or points outside its shard.
        """
        shard = shard or os.path.splitext(path)[0] + ".tar"
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            info, columns = parse(memoryview(data))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise IndexFileError(f"{path}: {reason}; run: python -m vlp.data.index --force {shard}") from error
        return cls(shard, info, columns)


def index_url(shard: str) -> str:
    """Return the URL of the index of a shard: NAME.index for NAME.tar."""
    if not shard.endswith(".tar"):
        raise ValueError(
            f"{shard!r} is not a shard: its name must end in .tar; rename it, or unpack it if it is compressed."
        )
    return shard.removesuffix(".tar") + ".index"


def open_index(shard: str) -> ShardIndex:
    """Map the index beside a shard and check that the shard still has the size that it had.

    Raises:
        IndexFileError: the index cannot be used, or the shard has been replaced since.
        StorageError: there is no such shard.
    """
    index = ShardIndex.load(storage.local_path(index_url(shard)), shard=shard)
    size = storage.size(shard)
    if size != index.info.size:
        rule = f"the shard has {size} bytes, but had {index.info.size} when it was indexed"
        raise IndexFileError(f"{shard}: {rule}; restore it, or run: python -m vlp.data.index --force {shard}")
    return index


def read_part(index: ShardIndex, row: int, name: str) -> bytes:
    """Return the bytes of the part "video", "txt" or "json" of a sample, after comparing their checksum.

    Raises:
        SampleError: the sample has no such part, storage gave up, or the bytes are not those that were indexed.
    """
    part = index.part(row, name)
    if part is None:
        reason = Reason.VIDEO_MISSING if name == "video" else Reason.CAPTION_MISSING
        raise SampleError(reason, index.key(row), index.shard, f"no {name} part")
    try:
        data = storage.read(index.shard, part.offset, part.size)
    except storage.StorageError as error:
        raise SampleError(Reason.READ_FAILED, index.key(row), index.shard, str(error)) from error
    if zlib.crc32(data) != part.crc32:
        raise SampleError(Reason.CHECKSUM, index.key(row), index.shard, f"{name} part at byte {part.offset}")
    return data


def meta_of(index: ShardIndex, row: int) -> dict[str, Any]:
    """Return the validated meta of a sample from its txt and json parts; "captions" holds at least one text.

    Raises:
        SampleError: as `read_part`, or the text breaks a rule of `vlp.data.meta`.
    """
    text, record = (read_part(index, row, name) if index.part(row, name) else None for name in ("txt", "json"))
    try:
        return parse_meta(text, record)
    except MetaError as error:
        raise SampleError(error.reason, index.key(row), index.shard, error.detail) from error


def fingerprint(indexes: Iterable[ShardIndex]) -> str:
    """Return the identity of a data set: sha256 over name, count, size and sha256 of its shards, in order."""
    digest = hashlib.sha256()
    for index in indexes:
        digest.update(json.dumps(index.info[:4]).encode() + b"\n")
    return digest.hexdigest()


def build_index(
    shard: str,
    *,
    on_damage: Literal["refuse", "keep"] = "refuse",
    limits: Limits = LIMITS,
    known_facts: Mapping[str, VideoFacts] | None = None,
) -> ShardIndex:
    """Index a shard in one sequential pass. Bad samples become rows that are not OK; the shard is not changed.

    Args:
        shard: URL of a tar file, made by vlp, by webdataset, by video2dataset or by `tar`.
        on_damage: "keep" keeps the samples before the first broken rule of the archive and notes it in `info.damage`.
        limits: for its videos.
        known_facts: by key, of videos that have been probed already.

    Raises:
        TarError: the archive is cut, damaged or not of the accepted subset, and on_damage is "refuse".
        StorageError: the shard cannot be read.
    """
    storage.forget(shard)
    stream, rows, damage = _HashedStream(shard), Rows(limits, known_facts or {}), ""
    try:
        for member in members(stream, size=stream.size, name=shard):
            part = PART_OF.get(split_name(member.name)[1])
            if part is None:
                rows.ignore(member.name)
                continue
            data, crc32 = stream.take(member.size, limit=rows.size_limit(part))
            rows.add(member.name, Part(member.offset, member.size, crc32), data)
    except TarError as error:
        if on_damage == "refuse":
            raise
        rows.cut(error.member, error.rule)
        damage = f"byte {error.offset}: {error.rule}"
    stream.seek(stream.size)
    columns, words = rows.pack()
    digest, name = stream.sha256.hexdigest(), os.path.basename(shard)
    ignored = (rows.num_ignored, rows.ignored_example)
    return ShardIndex(shard, Info(name, stream.size, digest, len(rows.rows), damage, *ignored, tuple(words)), columns)


def check_shard(shard: str) -> list[str]:
    """Compare a shard with its index; return one line for each damaged sample, or for what else differs.

    Raises:
        IndexFileError: the index cannot be used.
        StorageError: the shard cannot be read.
    """
    storage.forget(shard)
    index = ShardIndex.load(storage.local_path(index_url(shard)), shard=shard)
    stream = _HashedStream(shard)
    stream.seek(stream.size)
    if stream.sha256.hexdigest() == index.info.sha256:
        return []
    lines = [f"it has {stream.size} bytes, not {index.info.size}"] if stream.size != index.info.size else []
    for row in range(len(index)):
        for name in PARTS:
            part = index.part(row, name)
            if part and part.offset + part.size > stream.size:
                lines.append(f"{index.key(row)}: {name} part: cut off")
            elif part and _crc32(shard, part) != part.crc32:
                lines.append(f"{index.key(row)}: {name} part: its bytes have changed")
    return lines or ["no sample is damaged; headers or padding differ"]


class _HashedStream:
    """A shard read once from front to back; every byte that is passed goes into `sha256`."""

    def __init__(self, shard: str) -> None:
        self.shard, self.size = shard, storage.size(shard)
        self.sha256, self.position = hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = storage.read(self.shard, self.position, min(size, self.size - self.position))
        self.sha256.update(data)
        self.position += len(data)
        return data

    def seek(self, offset: int) -> None:
        while self.position < min(offset, self.size):
            self.read(min(_CHUNK, offset - self.position))

    def take(self, size: int, *, limit: int) -> tuple[bytes | None, int]:
        """Return the next `size` bytes, None if they are more than `limit`, and their crc32."""
        if size <= limit:
            data = self.read(size)
            return data, zlib.crc32(data)
        crc32 = 0
        for at in range(0, size, _CHUNK):
            crc32 = zlib.crc32(self.read(min(_CHUNK, size - at)), crc32)
        return None, crc32


def _crc32(shard: str, part: Part) -> int:
    crc32 = 0
    for at in range(0, part.size, _CHUNK):
        crc32 = zlib.crc32(storage.read(shard, part.offset + at, min(_CHUNK, part.size - at)), crc32)
    return crc32


def _index_one(shard: str, *, policy: Literal["refuse", "keep"], force: bool) -> tuple[int, str]:
    """Index one shard unless it has an up-to-date index; return the exit code and the line to print."""
    start_s = time.perf_counter()
    try:
        index = None if force else _up_to_date(shard)
        if index:
            return EXIT_OK, f"{shard}: unchanged, {_summary(index)}"
        index = build_index(shard, on_damage=policy)
        index.save(storage.local_path(index_url(shard)))
    except (TarError, storage.StorageError) as error:
        return EXIT_DAMAGED, str(error)
    except OSError as error:
        return EXIT_UNWRITABLE, f"{index_url(shard)}: cannot be written: {error.strerror}"
    return EXIT_OK, f"{shard}: {_summary(index)}, {time.perf_counter() - start_s:.1f} s"


def _up_to_date(shard: str) -> ShardIndex | None:
    path = storage.local_path(index_url(shard))
    try:
        newer = os.stat(path).st_mtime_ns >= os.stat(storage.local_path(shard)).st_mtime_ns
        return open_index(shard) if newer else None
    except (OSError, IndexFileError):
        return None


def _summary(index: ShardIndex) -> str:
    counts = index.counts()
    words = [f"{len(index)} samples", f"{counts.pop(Reason.OK, 0)} usable"]
    words += [f"{count} {reason.name.lower()}" for reason, count in counts.items()]
    info = index.info
    words += [f"{info.num_ignored} other members, such as {info.ignored_example!r}"] if info.num_ignored else []
    words += [f"{info.size / 1e6:.1f} MB"]
    words += [f"damaged at {info.damage}"] if info.damage else []
    return ", ".join(words)


def _check_one(shard: str) -> tuple[int, str]:
    try:
        lines = check_shard(shard)
    except (IndexFileError, storage.StorageError) as error:
        return EXIT_DAMAGED, str(error)
    if lines:
        return EXIT_DAMAGED, "\n".join([f"{shard}: differs from its index", *(f"    {line}" for line in lines)])
    return EXIT_OK, f"{shard}: as indexed"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0; 65 a shard is damaged or unreadable; 73 no index can be written; 78 bad URL."""
    parser = argparse.ArgumentParser(
        prog="python -m vlp.data.index", description="Make or check the indexes of shards."
    )
    parser.add_argument("urls", nargs="+", metavar="URL", help="a .tar file; {000..123} stands for a range")
    parser.add_argument("--check", action="store_true", help="compare shards with their indexes, change nothing")
    parser.add_argument("--policy", choices=("refuse", "keep"), default="refuse", help="what to do with a cut archive")
    parser.add_argument("--force", action="store_true", help="index again what has an up-to-date index")
    parser.add_argument("--workers", type=int, default=1, help="processes to use")
    options = parser.parse_args(arguments)
    try:
        shards = [shard for url in options.urls for shard in storage.expand(url)]
        for shard in shards:
            storage.local_path(index_url(shard))
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    work = _check_one if options.check else partial(_index_one, policy=options.policy, force=options.force)
    worst = EXIT_OK
    with ProcessPoolExecutor(max(1, options.workers)) as pool:
        for code, line in (pool.map if options.workers > 1 else map)(work, shards):
            print(line, flush=True)
            worst = max(worst, code)
    return worst


if __name__ == "__main__":
    sys.exit(main())
