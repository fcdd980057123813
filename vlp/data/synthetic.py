"""The embedded world as a source: rendered on this machine in a minute, so that a demo needs no download.

    World --scene, wording, render--> root/world-DIGEST/{train,test}-SHARD-000000.tar + .index, manifest.json

The digest covers the version and all parameters, so that two worlds never mix. The manifest holds the digest of each
shard: what is missing or damaged is rendered again, alone. The 200 test clips show (shape, colour, event) combinations
that no training clip shows; see `vlp.data.scene`.
"""

import hashlib
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

from tqdm import tqdm

from vlp.data import storage
from vlp.data.columns import IndexFileError
from vlp.data.index import ShardIndex, check_shard, fingerprint, index_url
from vlp.data.render import check_shape, encode_h264, grey, render
from vlp.data.scene import FULL, Palette, Scene, scene
from vlp.data.shards import Raw, write_shards
from vlp.data.soundtrack import soundtrack
from vlp.data.wording import captions, choices, hard_negative, phrases, questions

SPLITS = ("train", "test")
GREY = ("depth", "thermal")
SHOWN = ("video", "audio", *GREY)

_VERSION = 1  # of scenes, words and drawing; another one renders every world anew
_MANIFEST = "manifest.json"
_FEW = 150  # clips that are rendered here: starting processes would take longer


class _Shard(NamedTuple):
    split: str
    first: int  # index of its first scene
    num_clips: int
    path: str


class World:
    """Clips of shapes that move, change and follow each other; with captions, questions, options and time spans.

    Args:
        root: a folder for worlds; each has a folder of its own in it.
        num_train: clips to train on.
        num_test: clips of the held-out combinations.
        seed: another seed gives other clips.
        size: of the frames, in pixels.
        num_frames: of each clip.
        fps: frames a second.
        clips_per_shard: small, so that there are shards for every lane of the plan.
        shows: "video"; "audio" gives the clips a sound, see `vlp.data.soundtrack`; "depth" and "thermal" make them
            grey, which stands for what such cameras see.
        num_shapes: of 7; with fewer shapes and colours more clips look alike and differ only in what happens.
        num_colours: of 8.
        num_objects: in a clip, at most 2; with 1, looks tell even fewer clips apart.
    """

    def __init__(
        self,
        *,
        root: str,
        num_train: int = 3000,
        num_test: int = 200,
        seed: int = 0,
        size: int = 128,
        num_frames: int = 32,
        fps: float = 12.0,
        clips_per_shard: int = 100,
        shows: str = "video",
        num_shapes: int = FULL.num_shapes,
        num_colours: int = FULL.num_colours,
        num_objects: int = FULL.num_objects,
    ) -> None:
        for name, value in {"num_train": num_train, "num_test": num_test, "clips_per_shard": clips_per_shard}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps={fps} must be above 0; the usual is 12.")
        check_shape(size=size, num_frames=num_frames)
        if shows not in SHOWN:
            raise ValueError(f"shows={shows!r} is not known; use one of {', '.join(SHOWN)}.")
        self.palette = Palette(num_shapes, num_colours, num_objects)
        self.palette.check()
        self.num_clips = {"train": num_train, "test": num_test}
        self.seed, self.size, self.num_frames, self.fps = seed, size, num_frames, fps
        self.clips_per_shard, self.shows = clips_per_shard, shows
        self.directory = os.path.join(root, f"world-{self._digest()}")

    def prepare(self) -> None:
        """Render what is missing or damaged. Of several processes one works, the others wait for it.

        Other processes are started for more than a few clips, and import the main module: a script needs the usual
        `if __name__ == "__main__"`.

        Raises:
            ValueError: the folder cannot be written.
        """
        try:
            os.makedirs(self.directory, exist_ok=True)
            with storage.locked(os.path.join(self.directory, "lock")):
                known = self._read_manifest()
                missing = [shard for shard in self._plan() if not _is_whole(shard, known)]
                if missing:
                    self._render_all(missing)
                self._write_manifest(known)
        except OSError as error:
            place = error.filename or self.directory
            raise ValueError(f"root: {place} cannot be written: {error.strerror}; choose another.") from error

    def shards(self, split: str) -> list[str]:
        """Return the paths of the shards of "train" or "test"."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be 'train' or 'test'.")
        return [shard.path for shard in self._plan() if shard.split == split]

    def dropped(self) -> list[dict[str, str]]:
        """Return an empty list: nothing is lost on the way."""
        return []

    def test_is_train(self) -> bool:
        """Return False: the test split has clips, and combinations, of its own."""
        return False

    def _parameters(self) -> dict[str, Any]:
        shape = {"size": self.size, "num_frames": self.num_frames, "fps": self.fps}
        other = {} if self.shows == "video" else {"shows": self.shows}
        other |= {} if self.palette == FULL else self.palette._asdict()
        return {
            "version": _VERSION,
            "seed": self.seed,
            **self.num_clips,
            **shape,
            "shard": self.clips_per_shard,
        } | other

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._parameters(), sort_keys=True).encode()).hexdigest()[:12]

    def _plan(self) -> list[_Shard]:
        found = []
        for split in SPLITS:
            for number, first in enumerate(range(0, self.num_clips[split], self.clips_per_shard)):
                name = f"{_prefix(split, number)}-000000.tar"  # as write_shards names the first of a prefix
                num_clips = min(self.clips_per_shard, self.num_clips[split] - first)
                found.append(_Shard(split, first, num_clips, os.path.join(self.directory, name)))
        return found

    def _render_all(self, missing: list[_Shard]) -> None:
        num_clips = sum(shard.num_clips for shard in missing)
        with tqdm(total=num_clips, desc="rendering the world", unit="clip", disable=None) as bar:
            if num_clips <= _FEW:
                for shard in missing:
                    self._render_shard(shard)
                    bar.update(shard.num_clips)
                return
            # Spawned and not forked: a fork of a process whose threads hold locks can hang.
            spawn, num_workers = multiprocessing.get_context("spawn"), min(_num_cores(), len(missing))
            pool = ProcessPoolExecutor(num_workers, mp_context=spawn)
            try:
                jobs = {pool.submit(self._render_shard, shard): shard for shard in missing}
                for job in as_completed(jobs):
                    job.result()
                    bar.update(jobs[job].num_clips)
            finally:
                pool.shutdown(cancel_futures=True)  # an interrupted run must not render to the end

    def _render_shard(self, shard: _Shard) -> None:
        samples = (self._sample(shard.split, index) for index in range(shard.first, shard.first + shard.num_clips))
        prefix = _prefix(shard.split, shard.first // self.clips_per_shard)
        write_shards(samples, self.directory, prefix=prefix, max_samples_per_shard=shard.num_clips)

    def _sample(self, split: str, index: int) -> Raw:
        clip = scene(self.seed, index, split, duration_s=self.num_frames / self.fps, palette=self.palette)
        frames = render(clip, size=self.size, num_frames=self.num_frames)
        sound = soundtrack(clip) if self.shows == "audio" else None
        video = encode_h264(grey(frames) if self.shows in GREY else frames, fps=self.fps, sound=sound)
        return Raw(f"{split}-{index:06d}", video, "mp4", meta(clip))

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each shard by name; nothing if the manifest is missing or damaged."""
        try:
            with open(os.path.join(self.directory, _MANIFEST), encoding="utf-8") as file:
                manifest = json.load(file)
        except (FileNotFoundError, ValueError):
            return {}  # the indexes tell almost as much
        shards = manifest.get("shards") if isinstance(manifest, dict) else None
        return shards if isinstance(shards, dict) else {}

    def _write_manifest(self, known: dict[str, dict[str, Any]]) -> None:
        """Write the manifest if it is not the one that was read."""
        indexes = [ShardIndex.load(index_url(shard.path)) for shard in self._plan()]
        shards = {os.path.basename(index.shard): _facts(index) for index in indexes}
        if shards == known:
            return
        manifest = {"parameters": self._parameters(), "fingerprint": fingerprint(indexes), "shards": shards}
        with storage.replacing(os.path.join(self.directory, _MANIFEST)) as file:
            file.write(json.dumps(manifest, indent=1).encode())


def meta(clip: Scene) -> dict[str, Any]:
    """Return the record of a clip: captions, hard_negative, questions, choices, events with start_s and end_s."""
    spans = [{"start_s": round(event.start_s, 3), "end_s": round(event.end_s, 3)} for event in clip.events]
    return {
        "captions": captions(clip),
        "hard_negative": hard_negative(clip),
        "questions": questions(clip),
        "choices": choices(clip),
        "events": [{"text": text} | span for text, span in zip(phrases(clip), spans, strict=True)],
    }


def _prefix(split: str, number: int) -> str:
    return f"{split}-{number:04d}"


def _facts(index: ShardIndex) -> dict[str, Any]:
    return {"count": index.info.count, "size": index.info.size, "sha256": index.info.sha256}


def _is_whole(shard: _Shard, known: dict[str, dict[str, Any]]) -> bool:
    """Return whether a shard and its index are there, agree byte for byte, and are those of the manifest."""
    try:
        if check_shard(shard.path):
            return False
        facts = _facts(ShardIndex.load(index_url(shard.path)))
    except (IndexFileError, storage.StorageError):
        return False
    return facts["count"] == shard.num_clips and facts == known.get(os.path.basename(shard.path), facts)


def _num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
