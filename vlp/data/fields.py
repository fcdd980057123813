"""Sources of shards; and from a row of a shard to a sample, or to a tombstone that says why there is none.

    row of the index --> bytes, checksum --> caption --> times --> decode --> transforms --> Sample
                     \\--> whatever is wrong with it: SampleError --> tombstone with the reason, in the same place

Axes: T frames, H W pixels.
"""

import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from vlp.data import sandbox, storage
from vlp.data.columns import IndexFileError
from vlp.data.decode import Decoded, DecodeError, Pictures
from vlp.data.index import (
    ShardIndex,
    build_headers_index,
    build_index,
    check_size,
    fingerprint,
    index_path,
    meta_of,
    open_index,
    read_part,
)
from vlp.data.many_views import Fixed, View
from vlp.data.outage import OUTAGE_S
from vlp.data.plan import PADDING
from vlp.data.probe import ProbeError, VideoFacts, probe
from vlp.data.remote import is_remote, shown
from vlp.data.rng import generator, sample_key
from vlp.data.sampling import Draws
from vlp.data.shard_cache import ShardCache
from vlp.data.tar import TarError
from vlp.data.texts import OneCaption, TextChoice, Texts
from vlp.types import Reason, SampleError

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # uint8 [T, H, W, 3], one decision for all frames

_MAX_LISTED = 20  # shards that cannot be used, in one message
_MAX_OPEN = 1024  # mapped indexes of a process; the lanes of a rank read num_lanes / world_size windows at a time


class ShardsError(ValueError):
    """Shards are missing, damaged or not those that were indexed; one line each, with the remedy."""


class Source(Protocol):
    """Shards with an index beside each. Sources are `Shards`, `vlp.data.folder.Folder`, `vlp.data.synthetic.World`."""

    def prepare(self) -> None:
        """Make what is missing, once, whoever calls it how often. Raises ValueError for what the user must change."""
        ...

    def shards(self, split: str) -> list[str]:
        """Return the URLs of the .tar files of "train" or "test", after `prepare`."""
        ...

    def dropped(self) -> list[dict[str, str]]:
        """Return what was lost before it became a sample: "key", "where", "reason" and "detail" of each."""
        ...

    def test_is_train(self) -> bool:
        """Return whether the test split holds training samples."""
        ...


class Shards:
    """Tar shards that exist already, here or at http(s):// and s3:// URLs; the indexes that are missing are made."""

    def __init__(
        self,
        *,
        train: Sequence[str] = (),
        test: Sequence[str] = (),
        index_dir: str | None = None,
        headers_only: bool = False,
    ) -> None:
        """Take paths or URLs, in which {000..123} stands for a range and, of files here, * for anything.

        Args:
            train, test: the shards of each split.
            index_dir: a local folder for the indexes of remote shards; needed if there are any.
            headers_only: index remote shards by their headers, and find out at first read what they hold.

        Raises:
            ValueError: no shard, no folder for the index of a remote one, or two that differ in their query only.
        """
        self._shards = {
            "train": [url for pattern in train for url in storage.expand(pattern)],
            "test": [url for pattern in test for url in storage.expand(pattern)],
        }
        everything = dict.fromkeys([*self._shards["train"], *self._shards["test"]])
        self._paths = {shard: index_path(shard, index_dir=index_dir) for shard in everything}  # of the indexes
        if len(set(self._paths.values())) < len(self._paths):
            raise ValueError("two shards share one index: their URLs differ in nothing but query, user or password.")
        self._build_remote = build_headers_index if headers_only else build_index

    def prepare(self) -> None:
        """Index the shards that have no index. Of several processes one indexes a shard, the others wait for it.

        Raises:
            ShardsError: shards are missing or damaged, or their indexes cannot be written; names them.
            ValueError: the first shard of a split cannot be read.
            OutageError: the storage gives no answer.
        """
        missing = [shard for shard, path in self._paths.items() if not os.path.exists(path)]
        broken = []
        for shard in tqdm(missing, desc="indexing shards", unit="shard", disable=None):
            try:
                self._index(shard)
            except storage.OutageError:
                raise  # the others would wait as long, each for itself
            except (OSError, TarError, storage.StorageError) as error:
                broken.append(f"shard {shown(shard)!r} cannot be indexed: {error}; run: python -m vlp.data.index")
        if broken:
            raise ShardsError(_listed(broken))
        self._check_access(set(missing))

    def shards(self, split: str) -> list[str]:
        """Return the shards of "train" or "test"."""
        return self._shards[split]

    def dropped(self) -> list[dict[str, str]]:
        """Return an empty list: unusable samples keep their rows in the index."""
        return []

    def test_is_train(self) -> bool:
        """Return whether a shard is in both splits."""
        return not set(self._shards["train"]).isdisjoint(self._shards["test"])

    def _index(self, shard: str) -> None:
        path = self._paths[shard]
        with self._lock(shard):
            if not os.path.exists(path):
                (self._build_remote if is_remote(shard) else build_index)(shard).save(path)

    @contextmanager
    def _lock(self, shard: str) -> Iterator[None]:
        """Hold the lock of whoever indexes a shard: of a local one itself, so that no lock file is left behind."""
        if is_remote(shard):
            os.makedirs(os.path.dirname(self._paths[shard]) or ".", exist_ok=True)
            with storage.locked(self._paths[shard] + ".lock"):
                yield
            return
        with open(storage.local_path(shard), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _check_access(self, just_read: set[str]) -> None:
        """Ask for the first remote shard of each split, so that a wrong password is no matter of single samples."""
        for shards in self._shards.values():
            shard = next(filter(is_remote, shards), None)
            if shard is None or shard in just_read:
                continue
            try:
                check_size(ShardIndex.load(self._paths[shard], shard=shard), self._paths[shard])
            except storage.OutageError:
                raise
            except storage.StorageError as error:
                raise ValueError(f"shard {shown(shard)!r} cannot be read: {error}.") from error


class Sampling(Protocol):
    """Chooses at most `num_frames` times of a video, in seconds; without a generator the centred ones."""

    @property
    def num_frames(self) -> int: ...

    def __call__(self, duration_s: float, fps: float, rng: Draws | None) -> np.ndarray: ...


class Decoder(Protocol):
    """Makes pictures of the video part of a sample: its frames, or what its sound looks like."""

    @property
    def height(self) -> int | None: ...  # pixels of every picture; None where they are those of the video

    @property
    def width(self) -> int | None: ...

    def __call__(
        self, data: bytes, times_s: np.ndarray, *, short_side: int | None, key_frames: np.ndarray | None = None
    ) -> Decoded:
        """Return uint8 [T, H, W, 3] at times_s [T]. Raises DecodeError."""
        ...


class Clips(NamedTuple):
    """How a video becomes a clip."""

    sampling: Sampling
    transforms: Sequence[Transform]
    short_side: int | None  # pixels of the shorter side when decoded; None = as coded
    num_more: int = 0  # other clips of a training sample
    views: Sequence[View] = ()  # of a test sample; none looks once, with the sampling and the transforms above
    decoder: Decoder = Pictures()

    def shape(self) -> tuple[int, int, int, int]:
        """Return [T, H, W, 3] of every clip. Raises ValueError if its size depends on the video."""
        side = self.short_side or 64
        made = ((side, 2 * side), (side, side), (2 * side, side))
        if self.decoder.height is not None and self.decoder.width is not None:
            made = ((self.decoder.height, self.decoder.width),)
        sizes = {self.transformed(np.zeros((1, *size, 3), np.uint8), 0).shape for size in made}
        if len(sizes) > 1 or len(next(iter(sizes))) != 4:
            raise ValueError(
                f"the transforms make {' and '.join(map(str, sorted(sizes)))} of videos of different shapes; "
                "add one with a fixed size, such as vlp.data.transforms.CenterCrop."
            )
        return (self.sampling.num_frames, *next(iter(sizes))[1:])

    def transformed(self, frames: np.ndarray, key: int, number: int = 0) -> np.ndarray:
        """Apply all transforms to frames [T, H, W, 3] with the randomness of clip `number` of a sample."""
        rng = generator(key, _purpose("crop", number))
        for transform in self.views[number].transforms if self.views else self.transforms:
            frames = transform(frames, rng)
        return frames


class Clip(NamedTuple):
    """Another clip of a sample."""

    frames: np.ndarray  # [T, H, W, 3] uint8
    times_s: np.ndarray  # [T] float64


class Sample(NamedTuple):
    """One slot of a batch. Where `status` is not OK the frames are black and the texts are empty."""

    frames: np.ndarray  # [T, H, W, 3] uint8, T at most that of the clip
    times_s: np.ndarray  # [T] float64, seconds from the first frame of the video
    texts: Texts
    sample_id: int
    key: int  # of all its randomness
    status: Reason
    detail: str
    decode_s: float  # seconds that decoding took, all clips together
    more: tuple[Clip, ...] = ()  # the other clips of the same video


class ClipReader:
    """The samples of one split of one source, by their position in the concatenation of its shards. Can be pickled.

    Every random choice is a function of (seed, epoch, source, sample id): readers have no state but caches.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        clips: Clips,
        seed: int,
        source: int,
        train: bool,
        texts: TextChoice | None = None,
        index_dir: str | None = None,
        cache: ShardCache | None = None,
        outage_s: float = OUTAGE_S,
    ) -> None:
        """Open every index once. Raises IndexFileError and StorageError, which name the shard and the remedy.

        Remote shards need `index_dir`, where their indexes are, and may be kept on this machine by `cache`. Who reads
        samples waits `outage_s` for storage that gives no answer.
        """
        self.index_dir, self.cache, self.outage_s = index_dir, cache, outage_s
        self.texts = texts if texts is not None and train else OneCaption()
        self._ahead: list[int] = []
        self.clips, self.seed, self.source, self.train = clips, seed, source, train
        self.shards, self.shape = list(shards), clips.shape()
        self.num_more = clips.num_more if train else max(0, len(clips.views) - 1)
        self._by_reason = np.zeros((len(self.shards), len(Reason)), dtype=np.int64)
        self.fingerprint = fingerprint(self._opened())
        self._ends = np.cumsum(self._by_reason.sum(axis=1))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard, [S] int64, unusable ones included."""
        return self._by_reason.sum(axis=1)

    @property
    def sample_bytes(self) -> int:
        """Bytes of the frames of all clips of a sample, at most."""
        return (1 + self.num_more) * math.prod(self.shape)

    @property
    def by_reason(self) -> dict[Reason, int]:
        """How many samples have each status in the index, without those that none has."""
        return {reason: int(n) for reason, n in zip(Reason, self._by_reason.sum(axis=0), strict=True) if n}

    def read(self, sample_id: int, epoch: int, *, loaded: Callable[[], None] = lambda: None) -> Sample:
        """Return a sample; a tombstone if anything is wrong with it, or if `sample_id` is PADDING.

        `loaded` is called when all its bytes are there, before any of them is looked into.

        Raises OutageError where its storage gives no answer: nothing is known of the sample then.
        """
        if sample_id == PADDING:
            return self.tombstone(sample_id, epoch, Reason.PADDING)
        try:
            return self._read(sample_id, sample_key(self.seed, epoch, self.source, sample_id), loaded)
        except MemoryError:
            if not sandbox.is_capped():
                raise  # the machine has none left
            detail = "it takes more memory than data.worker_memory_gib allows"
            return self.tombstone(sample_id, epoch, Reason.LIMIT_EXCEEDED, detail)
        except SampleError as error:
            shard = self.shards[self._place(sample_id)[0]]
            if error.reason == Reason.READ_FAILED and not is_remote(shard) and storage.is_unmounted(shard):
                folder = os.path.dirname(storage.local_path(shard)) or "."
                raise storage.OutageError(error.detail, place=folder, what="the folder is gone or empty") from error
            return self.tombstone(sample_id, epoch, error.reason, error.detail)

    def fetch_ahead(self, shards: list[int]) -> None:
        """Let the cache fetch shards, given by their numbers, in the background; those asked for before may go."""
        if self.cache is None or shards == self._ahead:
            return
        self._ahead, indexes = shards, []
        for shard in (number for number in shards if is_remote(self.shards[number])):
            with suppress(IndexFileError, storage.StorageError):  # the read of a sample says so
                indexes.append(_index(self.shards[shard], self.index_dir))
        self.cache.ahead(f"{self.source} {self.train}", indexes)

    def shards_from(self, sample_id: int, *, count: int) -> list[int]:
        """Return the numbers of the shard of a sample and of those behind it, at most `count`."""
        shard = self._place(sample_id)[0]
        return list(range(shard, min(shard + count, len(self.shards))))

    def tombstone(self, sample_id: int, epoch: int, reason: Reason, detail: str = "") -> Sample:
        """Return what stands in the place of a sample that cannot be used."""
        key = sample_key(self.seed, epoch, self.source, sample_id)
        frames, times_s = np.zeros(self.shape, np.uint8), np.zeros(self.shape[0])
        texts = Texts("", (None,) * self.texts.num_others)
        more = (Clip(frames, times_s),) * self.num_more
        return Sample(frames, times_s, texts, sample_id, key, reason, detail, 0.0, more)

    def meta(self, sample_id: int) -> dict[str, Any]:
        """Return the whole record of a sample, "captions" and what else it has. Raises SampleError."""
        return meta_of(*self._locate(sample_id), cache=self.cache)

    def key_of(self, sample_id: int) -> str:
        """Return the key of a sample in its shard."""
        index, row = self._locate(sample_id)
        return index.key(row)

    def shard_of(self, sample_id: int) -> str:
        """Return the URL of the shard of a sample, without passwords."""
        return shown(self.shards[self._place(sample_id)[0]])

    def detail_of(self, sample_id: int) -> str:
        """Return what the index says against a sample, "" if nothing."""
        index, row = self._locate(sample_id)
        return index.detail(row)

    def unusable(self, limit: int) -> Iterator[tuple[int, Reason]]:
        """Yield id and reason of the first samples that the index calls unusable; opens only shards that have some."""
        for shard in np.flatnonzero(self._by_reason[:, Reason.OK + 1 :].sum(axis=1)):
            status = _index(self.shards[shard], self.index_dir).columns["status"]
            rows = np.flatnonzero(status != Reason.OK)[:limit]
            first = self._ends[shard] - len(status)
            yield from ((int(first + row), Reason(status[row])) for row in rows)
            limit -= len(rows)
            if not limit:
                return

    def sizes(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return how much of a batch each sample [N] fills: its frames first, then its longest caption, [N] int64.

        Raises OutageError where an index gives no answer.
        """
        shards = np.searchsorted(self._ends, sample_ids, side="right")
        sizes = np.zeros(len(sample_ids), dtype=np.int64)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            rows = sample_ids[here] - self._ends[shard] + self._by_reason[shard].sum()
            try:
                index = _index(self.shards[shard], self.index_dir)
            except storage.OutageError:
                raise  # another order would follow from other sizes
            except (IndexFileError, storage.StorageError):
                continue  # gone since: `read` says so, sample by sample
            chars = index.columns["num_caption_chars"][rows].clip(min=0)  # -1 where a quick index does not know
            sizes[here] = (self._num_frames(index, rows) << 32) + chars
        return sizes

    def captions(self, max_samples: int) -> Iterator[str]:
        """Yield all captions of at most so many samples, spread evenly; unreadable ones are left out."""
        for sample_id in np.unique(np.linspace(0, len(self) - 1, min(max_samples, len(self))).round().astype(int)):
            try:
                yield from self.meta(int(sample_id))["captions"]
            except SampleError:
                continue  # counted when training reads it

    def _read(self, sample_id: int, key: int, loaded: Callable[[], None]) -> Sample:
        index, row = self._locate(sample_id)
        where = (index.key(row), shown(index.shard))
        if index.status(row) != Reason.OK:
            raise SampleError(index.status(row), *where, index.detail(row))
        meta = meta_of(index, row, cache=self.cache)
        texts = self.texts(meta, key) if self.train else Texts(meta["captions"][0])
        video = read_part(index, row, "video", cache=self.cache)
        loaded()
        facts = _facts(index, row, video)
        times_s = [self._times(facts, key, number) for number in range(1 + self.num_more)]
        began = time.perf_counter()
        try:  # one decode for all clips: it sorts the times, and decodes a frame that two of them want once
            decoded = self.clips.decoder(
                video, np.concatenate(times_s), short_side=self.clips.short_side, key_frames=facts.key_frames
            )
        except DecodeError as error:
            if isinstance(error.__cause__, MemoryError):  # as the codecs' library says it
                raise error.__cause__ from error
            raise SampleError(error.reason, *where, error.detail) from error
        decode_s = time.perf_counter() - began
        index.note(row, "video", video, facts)
        first, *more = self._cut(decoded, [len(each) for each in times_s], key)
        for clip in (first, *more):
            if clip.frames.shape[1:] != self.shape[1:]:
                raise ValueError(
                    f"{where[0]}: the transforms gave {clip.frames.shape[1:3]} and not {self.shape[1:3]}; fix the size."
                )
        return Sample(*first, texts, sample_id, key, Reason.OK, "", decode_s, tuple(more))

    def _times(self, facts: VideoFacts, key: int, number: int) -> np.ndarray:
        """Return the times [T] of clip `number` of a sample, 0 the first."""
        if self.train:
            rng = generator(key, _purpose("times", number))
        else:
            rng = Fixed(self.clips.views[number].time) if self.clips.views else None
        return self.clips.sampling(facts.duration_s, facts.fps, rng)

    def _cut(self, decoded: Decoded, lengths: Sequence[int], key: int) -> list[Clip]:
        """Cut what was decoded into clips of so many frames, and transform each with randomness of its own."""
        ends = np.cumsum(lengths)[:-1]
        pairs = zip(np.split(decoded.frames, ends), np.split(decoded.times_s, ends), strict=True)
        return [
            Clip(self.clips.transformed(frames, key, number), times_s) for number, (frames, times_s) in enumerate(pairs)
        ]

    def _num_frames(self, index: ShardIndex, rows: np.ndarray) -> np.ndarray:
        """Return how many frames the sampling takes of rows [N], [N] int64; asked once for equal videos."""
        videos = np.stack([index.columns["duration_s"][rows], index.columns["fps"][rows]], axis=1)
        different, inverse = np.unique(videos, axis=0, return_inverse=True)
        counts = [len(self.clips.sampling(float(duration_s), float(fps), None)) for duration_s, fps in different]
        return np.array(counts, dtype=np.int64)[inverse.reshape(-1)]

    def _place(self, sample_id: int) -> tuple[int, int]:
        """Return the shard and the row of a sample."""
        assert 0 <= sample_id < len(self), f"sample {sample_id} of {len(self)}"
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return shard, int(sample_id - self._ends[shard] + self._by_reason[shard].sum())

    def _locate(self, sample_id: int) -> tuple[ShardIndex, int]:
        shard, row = self._place(sample_id)
        try:
            return _index(self.shards[shard], self.index_dir), row
        except storage.OutageError:
            raise
        except (IndexFileError, storage.StorageError) as error:  # it was there when the run began
            raise SampleError(Reason.READ_FAILED, f"sample {row}", shown(self.shards[shard]), str(error)) from error

    def _opened(self) -> Iterator[ShardIndex]:
        broken = []
        for number, shard in enumerate(self.shards):
            try:
                index = open_index(shard, index_dir=self.index_dir)
            except storage.OutageError:
                raise
            except (IndexFileError, storage.StorageError) as error:
                broken.append(str(error))  # name all of them: who repairs one wants to know of the others
                continue
            self._by_reason[number] = np.bincount(index.columns["status"], minlength=len(Reason))
            yield index
        if broken:
            raise IndexFileError(_listed(broken))


def _purpose(name: str, number: int) -> str:
    """Return the stream of clip `number` of a sample; the first has the plain name, however many there are."""
    return f"{name}{number or ''}"


def _facts(index: ShardIndex, row: int, video: bytes) -> VideoFacts:
    """Return the facts of a video, from the index if it knows them. Raises SampleError."""
    facts = index.facts(row)
    if facts is not None:
        return facts
    assert index.info.headers_only, "a row that is OK has been probed"
    try:
        return probe(video)
    except ProbeError as error:
        raise SampleError(error.reason, index.key(row), shown(index.shard), error.detail) from error


def _listed(lines: Sequence[str]) -> str:
    """Return one message of many, the first ones in full."""
    rest = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return "\n".join([*lines[:_MAX_LISTED], *rest])


@lru_cache(maxsize=_MAX_OPEN)
def _index(shard: str, index_dir: str | None) -> ShardIndex:
    return open_index(shard, index_dir=index_dir)
