"""A folder of videos with captions, as a source: what anyone has on a disk becomes shards without a script.

    scan --captions--> usable names --probe--> facts --split by hash of key--> cache/DIGEST/{train,test}-000000.tar

The digest covers names, sizes and times of all files, the captions and the options: nothing is done twice, and nothing
old is used. What is lost on the way is counted in `dropped`, and stops nothing.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tqdm import tqdm

from vlp.data import storage
from vlp.data.caption_table import TYPES, Clip, Lost, check_type, is_text, match, printable
from vlp.data.probe import LIMITS, ProbeError, VideoFacts, probe
from vlp.data.rows import STILLS, VIDEOS
from vlp.data.shards import Raw, write_shards
from vlp.types import Reason

EXTENSIONS = (*VIDEOS, *STILLS)

_VERSION = 1  # of what is written; another one makes every cache anew
_BATCH = 1024  # videos whose facts are waited for at once
_SUMMARY, _DROPPED = "folder.json", "dropped.json"


class _Video(NamedTuple):
    path: str  # below the folder, with "/"
    size: int
    time_ns: int


class Folder:
    """A folder of videos or pictures, searched recursively, with captions.

    Captions stand in a .csv or .jsonl file, whose lines name the video by path, file name or name without extension, or
    in a .txt beside each video, one a line. A video may have many.

    Args:
        videos: the folder.
        captions: the file; None: captions.csv or captions.jsonl in the folder if there is one, else the .txt files.
        cache: a folder for the shards; several sources may share it.
        holdout: share of clips in the test split, chosen by the hash of their keys.
        min_test: with fewer test clips than this, all clips are for training and the test split is the same clips.
        max_samples_per_shard: small, so that there are shards for every lane of the plan.
    """

    def __init__(
        self,
        videos: str,
        *,
        captions: str | None = None,
        cache: str,
        holdout: float = 0.1,
        min_test: int = 8,
        max_samples_per_shard: int = 256,
    ) -> None:
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout={holdout} must be at least 0 and below 1: the share of clips kept for the test.")
        if min_test < 1:
            raise ValueError(f"min_test={min_test} must be at least 1.")
        if max_samples_per_shard < 1:
            raise ValueError(f"max_samples_per_shard={max_samples_per_shard} must be at least 1.")
        self.videos, self.captions, self.cache = videos, captions, cache
        self.holdout, self.min_test, self.max_samples_per_shard = holdout, min_test, max_samples_per_shard
        self._ready: str | None = None  # the folder of shards, once it is known to be whole

    def prepare(self) -> None:
        """Make the shards unless they are there already. Of several processes one works, the others wait for it.

        Raises:
            ValueError: the folder, the captions or the cache cannot be used, or no clip is left; says what to change.
        """
        files = _scan(self.videos)
        captions = self._captions_file()
        target = os.path.join(self.cache, self._digest(files, captions))
        try:
            if not _is_whole(target):  # asked again under the lock; a cache that is whole may be read-only
                os.makedirs(self.cache, exist_ok=True)
                with storage.locked(target + ".lock"):
                    if not _is_whole(target):
                        self._build(files, captions, target)
        except OSError as error:
            rule = f"cannot be written: {error.filename or ''}: {error.strerror}"
            raise ValueError(f"cache={self.cache!r} {rule}; choose another folder.") from error
        self._ready = target

    def shards(self, split: str) -> list[str]:
        """Return the paths of the shards of "train" or "test"."""
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r} must be 'train' or 'test'.")
        return [os.path.join(self._folder(), name) for name in self._summary()[split]]

    def dropped(self) -> list[dict[str, str]]:
        """Return what never became a sample, as "key", "where", "reason" (a Reason in lower case) and "detail"."""
        with open(os.path.join(self._folder(), _DROPPED), encoding="utf-8") as file:
            return json.load(file)

    def test_is_train(self) -> bool:
        """Return whether there are too few clips for a test split, so that it holds the same clips as training."""
        return self._summary()["test_is_train"]

    def _folder(self) -> str:
        if self._ready is None:
            self.prepare()
        assert self._ready is not None
        return self._ready

    def _summary(self) -> dict[str, Any]:
        with open(os.path.join(self._folder(), _SUMMARY), encoding="utf-8") as file:
            return json.load(file)

    def _captions_file(self) -> str | None:
        if self.captions is not None:
            check_type(self.captions)
            return self.captions
        found = [os.path.join(self.videos, f"captions{kind}") for kind in TYPES]
        found = [path for path in found if os.path.isfile(path)]
        if len(found) > 1:
            raise ValueError(f"captions=None, but there are {' and '.join(found)}; set captions to one of them.")
        return found[0] if found else None

    def _digest(self, files: dict[str, _Video], captions: str | None) -> str:
        options = [_VERSION, self.holdout, self.min_test, self.max_samples_per_shard, captions is None]
        digest = hashlib.sha256(json.dumps(options).encode())
        for video in files.values():
            if captions is None or not is_text(video.path):
                digest.update(json.dumps(video).encode())
        if captions is not None:
            try:
                with open(captions, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise ValueError(f"captions={captions!r}: {error.strerror}; give a .csv or .jsonl file.") from error
        return digest.hexdigest()[:20]

    def _build(self, files: dict[str, _Video], captions: str | None, target: str) -> None:
        clips, lost = match(self.videos, [video.path for video in files.values()], captions)
        usable, broken = _probe_all(self.videos, clips, files)
        lost += broken
        if not usable:
            counts = Counter(item.reason.name.lower() for item in lost)
            words = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            first = f"{lost[0].where}: {lost[0].detail}"
            raise ValueError(f"videos={self.videos!r}: no clip is usable ({words}); the first is {first}.")
        train, test = self._split(usable)
        partial = target + ".partial"  # ours alone while the lock is held; what a killed process left is removed
        for leftover in (partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        summary: dict[str, Any] = {"test_is_train": not test, "num_clips": len(usable), "num_dropped": len(lost)}
        for split, chosen in (("train", train), ("test", test)):
            raws = _read_all(self.videos, tqdm(chosen, desc=f"writing {split}", unit="clip", disable=None))
            paths = write_shards(raws, partial, prefix=split, max_samples_per_shard=self.max_samples_per_shard)
            summary[split] = [os.path.basename(path) for path in paths]
        sizes = {name: os.path.getsize(os.path.join(partial, name)) for name in sorted(os.listdir(partial))}
        summary["sizes"] = sizes
        summary["test"] = summary["test"] or summary["train"]
        dropped = [item._asdict() | {"reason": item.reason.name.lower()} for item in lost]
        _write_json(os.path.join(partial, _DROPPED), dropped)
        _write_json(os.path.join(partial, _SUMMARY), summary)
        os.replace(partial, target)
        storage.sync_folder(self.cache)

    def _split(self, clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
        """Return clips for training and for the test; no test clips if they would be fewer than `min_test`."""
        num_test = int(self.holdout * len(clips) + 1e-9)  # 0.29 * 100 is a little less than 29
        if num_test < self.min_test:
            return clips, []
        order = sorted(clips, key=lambda clip: hashlib.sha256(clip.key.encode()).digest())
        held_out = {clip.key for clip in order[:num_test]}
        return [clip for clip in clips if clip.key not in held_out], [clip for clip in clips if clip.key in held_out]


def _scan(folder: str) -> dict[str, _Video]:
    """Return the videos, pictures and .txt files below a folder by path, in order; hidden ones are passed over."""
    if not os.path.isdir(folder):
        raise ValueError(f"videos={folder!r} is not a folder; give one that holds videos ({', '.join(EXTENSIONS)}).")
    found, others = [], Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(place, name)
            extension = os.path.splitext(name)[1].lower()
            others[extension or "no extension"] += 1
            if not name.startswith(".") and extension[1:] in (*EXTENSIONS, "txt") and os.path.isfile(path):
                status = os.stat(path)
                found.append(_Video(os.path.relpath(path, folder), status.st_size, status.st_mtime_ns))
    if all(is_text(video.path) for video in found):
        there = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5)) or "nothing"
        raise ValueError(f"videos={folder!r} holds no video ({there}); allowed are {', '.join(EXTENSIONS)}.")
    return {video.path: video for video in sorted(found)}


def _probe_all(folder: str, clips: list[Clip], files: dict[str, _Video]) -> tuple[list[Clip], list[Lost]]:
    """Return the clips whose video can be used, with its facts, and the others."""
    usable: list[Clip] = []
    lost: list[Lost] = []
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(clips), desc="checking videos", unit="video", disable=None) as bar,
    ):
        for at in range(0, len(clips), _BATCH):
            batch = clips[at : at + _BATCH]
            sizes = [files[clip.path].size for clip in batch]
            for clip, facts in zip(batch, pool.map(_probe, [folder] * len(batch), batch, sizes), strict=True):
                if isinstance(facts, ProbeError):
                    lost.append(Lost(clip.key, printable(clip.path), facts.reason, facts.detail))
                else:
                    usable.append(clip._replace(facts=facts))
                bar.update()
    return usable, lost


def _probe(folder: str, clip: Clip, size: int) -> VideoFacts | ProbeError:
    if size > LIMITS.max_bytes:
        return ProbeError(Reason.LIMIT_EXCEEDED, f"{size} bytes; at most {LIMITS.max_bytes} are allowed")
    try:
        with open(os.path.join(folder, clip.path), "rb") as file:
            return probe(file.read())
    except OSError as error:
        return ProbeError(Reason.READ_FAILED, error.strerror or str(error))
    except ProbeError as error:
        return error


def _read_all(folder: str, clips: Iterable[Clip]) -> Iterator[Raw]:
    for clip in clips:
        try:
            with open(os.path.join(folder, clip.path), "rb") as file:
                video = file.read()
        except OSError as error:
            raise ValueError(f"{clip.path!r} changed meanwhile: {error.strerror}; run again.") from error
        extension = os.path.splitext(clip.path)[1][1:].lower()
        yield Raw(clip.key, video, extension, clip.meta, clip.facts)


def _is_whole(folder: str) -> bool:
    """Return whether a cache is complete and nobody has taken files out of it."""
    try:
        with open(os.path.join(folder, _SUMMARY), encoding="utf-8") as file:
            sizes = json.load(file)["sizes"]
        return all(os.path.getsize(os.path.join(folder, name)) == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _write_json(path: str, value: object) -> None:
    with storage.replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())
