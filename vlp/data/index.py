"""The index beside a shard: where each part of each sample lies, its checksum, and what its video is.

NAME.tar has NAME.index, see `vlp.data.columns`. Reading a tar says neither how many samples there should be nor whether
one is damaged, so training opens shards through their index only. `python -m vlp.data.index URL...` makes and checks
indexes, of foreign shards too; a shard is never rewritten. The indexes of remote shards lie in a local folder.
"""

import argparse
import hashlib
import json
import mmap
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vlp.data import storage
from vlp.data.columns import PARTS, IndexFileError, Info, Part, dump, parse
from vlp.data.first_read import FirstReads, Seen, seen_path
from vlp.data.meta import MetaError, parse_meta
from vlp.data.probe import LIMITS, Limits, VideoFacts
from vlp.data.remote import is_remote, shown
from vlp.data.rows import PART_OF, Rows, split_name
from vlp.data.stream import CHUNK, HashedStream, HeaderStream
from vlp.data.tar import Member, TarError, members
from vlp.types import Reason, SampleError

EXIT_OK, EXIT_DAMAGED, EXIT_UNWRITABLE, EXIT_USAGE = 0, 65, 73, 78


class ShardIndex:
    """The rows of a shard, OK or not. `columns` holds them as arrays, for whoever needs all rows at once.

    Args:
        shard: URL of the shard.
        info: of the shard as a whole.
        columns: arrays by name, as SCHEMA and RAGGED of `vlp.data.columns` describe them.
        seen: what first reads found out, of an index of headers.
    """

    def __init__(
        self, shard: str, info: Info, columns: Mapping[str, np.ndarray], *, seen: FirstReads | None = None
    ) -> None:
        self.shard, self.info, self.columns = shard, info, columns
        self._seen = seen

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
        at, c = (row, PARTS.index(name)), self.columns
        size = int(c["part_size"][at])
        return Part(int(c["part_offset"][at]), size, int(c["part_crc"][at])) if size >= 0 else None

    def crc32(self, row: int, name: str) -> int | None:
        """Return the checksum of a part that a sample has; None in an index of headers if nobody has read it."""
        if not self.info.headers_only:
            return int(self.columns["part_crc"][row, PARTS.index(name)])
        seen = self._seen.get(row, name) if self._seen else None
        return seen.crc32 if seen else None

    def note(self, row: int, name: str, data: bytes, facts: VideoFacts | None = None) -> None:
        """Keep the checksum, and the facts of a video, of a part that proved to be good, if they are not known yet."""
        if self._seen and not self._seen.knows(row, name):
            self._seen.note(row, name, Seen(zlib.crc32(data), facts))

    def extension(self, row: int) -> str:
        """Return the lower-case extension of the video part, "" if there is none."""
        return self.info.words[self.columns["extension"][row]]

    def facts(self, row: int) -> VideoFacts | None:
        """Return what the probe found; None if it failed, or if nobody has read the video of an index of headers."""
        c = self.columns
        if not c["width"][row]:
            seen = self._seen.get(row, "video") if self._seen else None
            return seen.facts if seen else None
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
        with suppress(FileNotFoundError):
            os.unlink(seen_path(path))  # was found out of what was indexed before

    @classmethod
    def load(cls, path: str, *, shard: str | None = None) -> "ShardIndex":
        """Map an index, which takes a descriptor until it is dropped; `shard` is by default the one beside it.

        Raises:
            IndexFileError: the file is missing, damaged, of another version, or points outside its shard.
        OutageError: the file system gives no answer.
        """
        shard = shard or os.path.splitext(path)[0] + ".tar"
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            info, columns = parse(memoryview(data))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, OSError) and isinstance(found := storage.failure(path, error), storage.OutageError):
                raise found from error
            reason = error.strerror if isinstance(error, OSError) else error
            raise IndexFileError(f"{path}: {reason}; {_remedy(shard, path)}") from error
        seen = FirstReads(seen_path(path), count=info.count) if info.headers_only else None
        return cls(shard, info, columns, seen=seen)


def index_url(shard: str) -> str:
    """Return the path or file URL of the index beside a shard: NAME.index for NAME.tar. Raises ValueError."""
    place = shown(shard) if is_remote(shard) else shard
    if not place.endswith(".tar"):
        raise ValueError(
            f"{place!r} is not a shard: its name must end in .tar; rename it, or unpack it if it is compressed."
        )
    return place.removesuffix(".tar") + ".index"


def index_path(shard: str, *, index_dir: str | None = None) -> str:
    """Return where the index of a shard lies: beside a local shard, in `index_dir` for a remote one.

    The name in `index_dir` is that of the shard and a digest of its URL without what may change: password and query.

    Raises:
        ValueError: the URL is no shard, or remote and there is no `index_dir`.
    """
    storage.check(shard)
    beside = index_url(shard)
    if not is_remote(shard):
        return storage.local_path(beside)
    if index_dir is None:
        raise ValueError(
            f"{shown(shard)!r}: the indexes of remote shards need a local folder; give data.index_dir, or --index-dir "
            "on the command line of vlp.data.index."
        )
    name = os.path.basename(beside).removesuffix(".index")
    return os.path.join(index_dir, f"{name}-{hashlib.sha256(beside.encode()).hexdigest()[:16]}.index")


def open_index(shard: str, *, index_dir: str | None = None) -> ShardIndex:
    """Map the index of a shard and check that a local shard still has the size that it had.

    A remote shard is not asked: thousands of them would take minutes. Its parts are checked when they are read.

    Raises:
        IndexFileError: the index cannot be used, or the shard has been replaced since.
        StorageError: there is no such shard.
        ValueError: as `index_path`.
    """
    path = index_path(shard, index_dir=index_dir)
    index = ShardIndex.load(path, shard=shard)
    if not is_remote(shard):
        check_size(index, path)
    return index


def check_size(index: ShardIndex, path: str) -> None:
    """Raise IndexFileError unless a shard has the size that it had when it was indexed; StorageError if it is gone."""
    size = storage.size(index.shard)
    if size != index.info.size:
        rule = f"the shard has {size} bytes, but had {index.info.size} when it was indexed"
        raise IndexFileError(f"{shown(index.shard)}: {rule}; restore it, or {_remedy(index.shard, path)}")


def _remedy(shard: str, path: str) -> str:
    folder = f" --index-dir {os.path.dirname(path)}" if is_remote(shard) else ""
    return f"run: python -m vlp.data.index --force{folder} {shown(shard)}"


class Cache(Protocol):
    """Bytes of remote shards that are on this machine already, see `vlp.data.shard_cache`."""

    def read(self, index: ShardIndex, offset: int, size: int) -> bytes | None:
        """Return None if the shard is not there."""
        ...

    def drop(self, index: ShardIndex) -> None:
        """Remove a shard whose bytes are wrong."""
        ...


def read_part(index: ShardIndex, row: int, name: str, *, cache: Cache | None = None) -> bytes:
    """Return the bytes of the part "video", "txt" or "json" of a sample, after comparing their checksum.

    Wrong bytes of a cached shard are dropped, wrong bytes from remote storage are asked for once more.

    Raises:
        SampleError: the sample has no such part, storage refused it, or the bytes are not those that were indexed.
        OutageError: the storage gives no answer.
    """
    part, shard = index.part(row, name), shown(index.shard)
    if part is None:
        reason = Reason.VIDEO_MISSING if name == "video" else Reason.CAPTION_MISSING
        raise SampleError(reason, index.key(row), shard, f"no {name} part")
    try:
        for data in _attempts(index, part, cache):
            if index.crc32(row, name) in (None, zlib.crc32(data)):
                return data
    except storage.OutageError:
        raise
    except storage.StorageError as error:
        raise SampleError(Reason.READ_FAILED, index.key(row), shard, str(error)) from error
    raise SampleError(Reason.CHECKSUM, index.key(row), shard, f"{name} part at byte {part.offset}")


def _attempts(index: ShardIndex, part: Part, cache: Cache | None) -> Iterator[bytes]:
    """Yield the bytes of a part from each place that may have them; asked for another one, the last was wrong."""
    if cache and (data := cache.read(index, part.offset, part.size)) is not None:
        yield data
        cache.drop(index)
    yield storage.read(index.shard, part.offset, part.size)
    if is_remote(index.shard):
        yield storage.read(index.shard, part.offset, part.size)


def meta_of(index: ShardIndex, row: int, *, cache: Cache | None = None) -> dict[str, Any]:
    """Return the validated meta of a sample from its txt and json parts; "captions" holds at least one text.

    Raises:
        SampleError: as `read_part`, or the text breaks a rule of `vlp.data.meta`.
    """
    parts = {name: read_part(index, row, name, cache=cache) for name in ("txt", "json") if index.part(row, name)}
    try:
        meta = parse_meta(parts.get("txt"), parts.get("json"))
    except MetaError as error:
        raise SampleError(error.reason, index.key(row), shown(index.shard), error.detail) from error
    for name, data in parts.items():
        index.note(row, name, data)
    return meta


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
    stream, rows = HashedStream(shard), Rows(limits, known_facts or {})

    def add(member: Member, part: str) -> None:
        data, crc32 = stream.take(member.size, limit=rows.size_limit(part))
        rows.add(member.name, Part(member.offset, member.size, crc32), data)

    damage = _gather(stream, rows, add, shard=shard, on_damage=on_damage)
    stream.seek(stream.size)
    return _packed(shard, stream, rows, damage)


def build_headers_index(
    shard: str, *, on_damage: Literal["refuse", "keep"] = "refuse", limits: Limits = LIMITS
) -> ShardIndex:
    """Index a shard by its tar headers alone, for remote shards too large to be read whole; see `Info.headers_only`.

    Takes and raises what `build_index` does. Bad samples are found when training reads them.
    """
    storage.forget(shard)
    stream, rows = HeaderStream(shard), Rows(limits, {})

    def add(member: Member, part: str) -> None:
        rows.add_unread(member.name, Part(member.offset, member.size, 0))

    damage = _gather(stream, rows, add, shard=shard, on_damage=on_damage)
    index = _packed(shard, stream, rows, damage)
    return ShardIndex(shard, index.info._replace(headers_only=True), index.columns)


def _gather(
    stream: HashedStream | HeaderStream,
    rows: Rows,
    add: Callable[[Member, str], None],
    *,
    shard: str,
    on_damage: Literal["refuse", "keep"],
) -> str:
    """Give each member that is part of a sample to `add`; return the damage that ended the archive, "" if none did."""
    try:
        for member in members(stream, size=stream.size, name=shown(shard)):
            part = PART_OF.get(split_name(member.name)[1])
            if part is None:
                rows.ignore(member.name)
            else:
                add(member, part)
    except TarError as error:
        if on_damage == "refuse":
            raise
        rows.cut(error.member, error.rule)
        return f"byte {error.offset}: {error.rule}"
    return ""


def _packed(shard: str, stream: HashedStream | HeaderStream, rows: Rows, damage: str) -> ShardIndex:
    columns, words = rows.pack()
    digest, name = stream.sha256.hexdigest(), storage.file_name(shard)
    ignored = (rows.num_ignored, rows.ignored_example)
    return ShardIndex(shard, Info(name, stream.size, digest, len(rows.rows), damage, *ignored, tuple(words)), columns)


def check_shard(shard: str, *, index_dir: str | None = None) -> list[str]:
    """Compare a shard with its index; return one line for each damaged sample, or for what else differs.

    Raises:
        IndexFileError: the index cannot be used.
        StorageError: the shard cannot be read.
    """
    storage.forget(shard)
    index = ShardIndex.load(index_path(shard, index_dir=index_dir), shard=shard)
    if index.info.headers_only:
        same = build_headers_index(shard, on_damage="keep").info == index.info
        return list(_changed(index, index.info.size)) if same else ["its headers differ"]
    stream = HashedStream(shard)
    stream.seek(stream.size)
    if stream.sha256.hexdigest() == index.info.sha256:
        return []
    lines = [f"it has {stream.size} bytes, not {index.info.size}"] if stream.size != index.info.size else []
    lines += _changed(index, stream.size)
    return lines or ["no sample is damaged; headers or padding differ"]


def _changed(index: ShardIndex, size: int) -> Iterator[str]:
    """Yield a line for each part that is not as it was, in a shard of `size` bytes."""
    for row in range(len(index)):
        for name in PARTS:
            part, crc32 = index.part(row, name), index.crc32(row, name)
            if part and part.offset + part.size > size:
                yield f"{index.key(row)}: {name} part: cut off"
            elif part and crc32 not in (None, _crc32(index.shard, part)):
                yield f"{index.key(row)}: {name} part: its bytes have changed"


def _crc32(shard: str, part: Part) -> int:
    crc32 = 0
    for at in range(0, part.size, CHUNK):
        crc32 = zlib.crc32(storage.read(shard, part.offset + at, min(CHUNK, part.size - at)), crc32)
    return crc32


class _Job(NamedTuple):
    """What the command line wants done with each shard."""

    index_dir: str | None
    policy: Literal["refuse", "keep"]
    force: bool
    headers_only: bool

    def index(self, shard: str) -> tuple[int, str]:
        """Index one shard unless it has an up-to-date index; return the exit code and the line to print."""
        start_s, path = time.perf_counter(), index_path(shard, index_dir=self.index_dir)
        build = build_headers_index if self.headers_only else build_index
        try:
            index = None if self.force else _up_to_date(shard, path, headers_only=self.headers_only)
            if index:
                return EXIT_OK, f"{shown(shard)}: unchanged, {_summary(index)}"
            index = build(shard, on_damage=self.policy)
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            index.save(path)
        except (TarError, storage.StorageError) as error:
            return EXIT_DAMAGED, str(error)
        except OSError as error:
            return EXIT_UNWRITABLE, f"{path}: cannot be written: {error.strerror}"
        return EXIT_OK, f"{shown(shard)}: {_summary(index)}, {time.perf_counter() - start_s:.1f} s"

    def check(self, shard: str) -> tuple[int, str]:
        """Compare one shard with its index; return the exit code and the lines to print."""
        try:
            lines = check_shard(shard, index_dir=self.index_dir)
        except (IndexFileError, storage.StorageError, TarError) as error:
            return EXIT_DAMAGED, str(error)
        if lines:
            head = f"{shown(shard)}: differs from its index"
            return EXIT_DAMAGED, "\n".join([head, *(f"    {line}" for line in lines)])
        return EXIT_OK, f"{shown(shard)}: as indexed"


def _up_to_date(shard: str, path: str, *, headers_only: bool) -> ShardIndex | None:
    """Return the index at `path` if it is not older than a local shard and knows enough."""
    try:
        newer = is_remote(shard) or os.stat(path).st_mtime_ns >= os.stat(storage.local_path(shard)).st_mtime_ns
        index = ShardIndex.load(path, shard=shard)
        check_size(index, path)
    except (OSError, IndexFileError):
        return None
    return index if newer and (headers_only or not index.info.headers_only) else None


def _summary(index: ShardIndex) -> str:
    counts = index.counts()
    words = [f"{len(index)} samples", f"{counts.pop(Reason.OK, 0)} usable"]
    words += [f"{count} {reason.name.lower()}" for reason, count in counts.items()]
    info = index.info
    words += ["from the headers only"] if info.headers_only else []
    words += [f"{info.num_ignored} other members, such as {info.ignored_example!r}"] if info.num_ignored else []
    words += [f"{info.size / 1e6:.1f} MB"]
    words += [f"damaged at {info.damage}"] if info.damage else []
    return ", ".join(words)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0; 65 a shard is damaged or unreadable; 73 no index can be written; 78 bad URL."""
    options = _options(arguments)
    try:
        shards = [shard for url in options.urls for shard in storage.expand(url)]
        for shard in shards:
            index_path(shard, index_dir=options.index_dir)
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    job = _Job(options.index_dir, options.policy, options.force, options.headers_only)
    worst = EXIT_OK
    with ProcessPoolExecutor(max(1, options.workers)) as pool:
        work = job.check if options.check else job.index
        for code, line in (pool.map if options.workers > 1 else map)(work, shards):
            print(line, flush=True)
            worst = max(worst, code)
    return worst


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlp.data.index", description="Make or check the indexes of shards."
    )
    urls = "a .tar file, or its http(s):// or s3:// URL; {000..123} stands for a range"
    parser.add_argument("urls", nargs="+", metavar="URL", help=urls)
    parser.add_argument("--check", action="store_true", help="compare shards with their indexes, change nothing")
    parser.add_argument("--policy", choices=("refuse", "keep"), default="refuse", help="what to do with a cut archive")
    parser.add_argument("--force", action="store_true", help="index again what has an up-to-date index")
    parser.add_argument("--workers", type=int, default=1, help="processes to use")
    parser.add_argument("--index-dir", metavar="DIR", help="where the indexes of remote shards lie")
    parser.add_argument(
        "--headers-only", action="store_true", help="read no videos and captions: quick, checks nothing"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
