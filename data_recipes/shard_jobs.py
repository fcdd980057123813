"""One shard at a time: what goes into it, whether it is there already, and what happened when it was made.

    Job --digest equals that of records/PREFIX.json, and the shards are whole--> nothing to do
        --else--> remove, write PREFIX-000000.tar + .index, and the record last

A record is written when all of its shard is on disk, so what a killed process leaves is made again and nothing else is.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from glob import escape, glob
from typing import Any, NamedTuple

from data_recipes.encode import Encoding, SpanError, stored
from data_recipes.items import Dropped, Item
from data_recipes.looks import Look, look
from data_recipes.packed import unpacked
from data_recipes.videos import File, kind_of
from vlp.data import storage
from vlp.data.index import index_url
from vlp.data.meta import MetaError, parse_meta
from vlp.data.probe import LIMITS, ProbeError
from vlp.data.shards import Raw, write_shards
from vlp.types import Reason

RECORDS, LOOKS = "records", "looks"  # folders beside the shards
_VERSION = 1  # of what is written; another one makes every shard anew
_MAX_BYTES = 4 << 30  # of a tar file


class Work(NamedTuple):
    """An item with the file that was found for it."""

    key: str  # in the shard
    item: Item
    file: File


class Job(NamedTuple):
    """Everything that decides about the bytes of a shard."""

    prefix: str  # "train-000012"
    out: str
    videos: str
    encoding: Encoding
    work: list[Work]


class Record(NamedTuple):
    """What is known of a finished shard; the content of its JSON file."""

    digest: str  # of the job
    shards: dict[str, int]  # size of each tar file by name
    written: list[str]  # keys of items, as annotated
    num_bytes: int  # of videos
    seconds: float  # of videos
    dropped: list[Dropped]
    notes: dict[str, int]  # what the user should know, and how often


def job_digest(job: Job) -> str:
    """Return the identity of what a job makes: options, annotations, and the files by size and time."""
    return hashlib.sha256(json.dumps([_VERSION, job.prefix, job.encoding, job.work]).encode()).hexdigest()[:32]


def record_of(job: Job) -> Record | None:
    """Return the record of a job that is done, None if any of it is missing or was made of something else."""
    try:
        with open(_record_path(job), encoding="utf-8") as file:
            values = json.load(file)
        record = Record(**{**values, "dropped": [Dropped(*item) for item in values["dropped"]]})
        paths = {os.path.join(job.out, name): size for name, size in record.shards.items()}
        whole = all(os.path.getsize(path) == size and os.path.exists(index_url(path)) for path, size in paths.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole and record.digest == job_digest(job) else None


def make_shard(job: Job) -> Record:
    """Write the shard of a job, its index and its record; unusable items are in the record and not in the shard.

    Raises:
        OSError: the folder cannot be written.
    """
    _remove(job)
    making = _Making(job)
    paths = write_shards(
        making.raws(),
        job.out,
        prefix=job.prefix,
        max_samples_per_shard=max(1, len(job.work)),
        max_bytes_per_shard=_MAX_BYTES,
    )
    record = Record(
        digest=job_digest(job),
        shards={os.path.basename(path): os.path.getsize(path) for path in paths},
        written=making.written,
        num_bytes=making.num_bytes,
        seconds=round(making.seconds, 3),
        dropped=making.dropped,
        notes=dict(making.notes),
    )
    with storage.replacing(_record_path(job)) as file:
        file.write(json.dumps(record._asdict()).encode())
    return record


def make_looks(job: Job) -> list[Look]:
    """Return what the items of a job look like, from a file beside the shards if that is up to date.

    Raises:
        OSError: the folder cannot be written.
    """
    path, digest = os.path.join(job.out, LOOKS, f"{job.prefix}.json"), job_digest(job)
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
        if known["digest"] == digest:
            return [Look(*each) for each in known["looks"]]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    looks = []
    for work in job.work:
        try:
            looks.append(look(read(job.videos, work.file), work.item.span))
        except (OSError, ProbeError):
            looks.append(Look("", 0.0))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with storage.replacing(path) as file:
        file.write(json.dumps({"digest": digest, "looks": looks}).encode())
    return looks


def read(folder: str, file: File) -> bytes:
    """Return the content of a video.

    Raises:
        OSError: it cannot be read.
        ProbeError: it is too large.
    """
    if file.size > LIMITS.max_bytes:
        raise ProbeError(Reason.LIMIT_EXCEEDED, f"{file.size} bytes; at most {LIMITS.max_bytes} are allowed")
    with open(os.path.join(folder, file.path), "rb") as opened:
        if file.offset < 0:
            return opened.read()
        opened.seek(file.offset)
        return unpacked(opened.read(file.size))


class _Making:
    """The samples of a shard while it is made, and what became of the items."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.written: list[str] = []
        self.num_bytes, self.seconds = 0, 0.0
        self.dropped: list[Dropped] = []
        self.notes: Counter[str] = Counter()
        self._last: tuple[File, bytes] | None = None  # clips of one video follow each other

    def raws(self) -> Iterator[Raw]:
        for work in self.job.work:
            item = work.item
            try:
                yield self._raw(work)
            except (ProbeError, MetaError) as error:
                self._drop(work, error.reason.name.lower(), error.detail)
            except SpanError as error:
                self._drop(work, "span_refused", str(error))
            except OSError as error:
                self._drop(work, Reason.READ_FAILED.name.lower(), error.strerror or str(error))
            else:
                self.written.append(item.key)

    def _raw(self, work: Work) -> Raw:
        item = work.item
        meta = _meta(item)
        video, extension, facts, notes = stored(
            self._read(work.file), kind_of(work.file), span=item.span, encoding=self.job.encoding
        )
        self.num_bytes += len(video)
        self.seconds += facts.duration_s
        self.notes.update(notes)
        return Raw(work.key, video, extension, meta, facts)

    def _read(self, file: File) -> bytes:
        if self._last is None or self._last[0] != file:
            self._last = file, read(self.job.videos, file)
        return self._last[1]

    def _drop(self, work: Work, reason: str, detail: str) -> None:
        self.dropped.append(Dropped(work.item.key, work.file.path, reason, detail, work.item.split))


def _meta(item: Item) -> dict[str, Any]:
    meta = parse_meta(None, json.dumps({**item.fields, "captions": item.captions}).encode())
    try:
        json.dumps(meta, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # half a surrogate pair: the annotation is in another encoding
        raise MetaError(Reason.CAPTION_BROKEN, f"a field beside the captions cannot be stored: {error}") from error
    return meta


def _record_path(job: Job) -> str:
    return os.path.join(job.out, RECORDS, f"{job.prefix}.json")


def _remove(job: Job) -> None:
    """Remove what is there of a shard, the record first."""
    shards = glob(os.path.join(escape(job.out), f"{job.prefix}-*.tar"))
    for path in [_record_path(job), *shards, *map(index_url, shards)]:
        with suppress(FileNotFoundError):
            os.unlink(path)
