"""Writes samples into tar shards in the WebDataset layout, each with its index, whole or not at all.

A sample is key.EXTENSION, key.json (its meta) and key.txt (its first caption). The same samples give the same bytes.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from vlp.data import storage
from vlp.data.index import ShardIndex, build_index, index_url
from vlp.data.meta import MetaError, parse_meta
from vlp.data.probe import VideoFacts
from vlp.data.rows import STILLS, VIDEOS, split_name
from vlp.data.tar import check_name


class Raw(NamedTuple):
    """A sample before it is written."""

    key: str  # no dot after the last slash: the name of a member is split at its first dot
    video: bytes  # any content, a broken one too: it becomes a row that is not OK
    extension: str  # one of VIDEOS or STILLS of `vlp.data.rows`, "mp4"
    meta: dict[str, Any]  # with "captions", see `vlp.data.meta`
    facts: VideoFacts | None = None  # if the video has been probed already


def write_shards(
    samples: Iterable[Raw],
    directory: str,
    *,
    prefix: str,
    max_samples_per_shard: int,
    max_bytes_per_shard: int = 1 << 30,
) -> list[str]:
    """Write samples, in order, to DIRECTORY/PREFIX-000000.tar and so on; return the paths.

    Each shard is written under a temporary name, synced and renamed, then its index. A killed writer leaves whole
    shards, of which the last may lack its index. One sample is in memory at a time.

    Args:
        samples: any number; no shard is written if there are none.
        directory: is made if it is missing.
        prefix: of the file names.
        max_samples_per_shard: after which a new shard begins.
        max_bytes_per_shard: of videos, before which a new shard begins; a larger sample has a shard of its own.

    Raises:
        ValueError: a key, an extension or a meta that no reader would accept, or a key twice in a shard.
    """
    if max_samples_per_shard < 1 or not prefix or "/" in prefix:
        rule = "at least one sample a shard and a prefix without '/' are needed"
        raise ValueError(f"max_samples_per_shard={max_samples_per_shard}, prefix={prefix!r}: {rule}.")
    os.makedirs(directory, exist_ok=True)
    rest, paths = iter(samples), []
    sample = next(rest, None)
    while sample is not None:
        path = os.path.join(directory, f"{prefix}-{len(paths):06d}.tar")
        index_path = index_url(path)
        with suppress(FileNotFoundError):
            os.unlink(index_path)  # never the index of an older shard beside a new one
        facts: dict[str, VideoFacts] = {}
        with storage.replacing(path) as file:
            limits = (max_samples_per_shard, max_bytes_per_shard)
            sample = _fill(file, sample, rest, limits=limits, facts=facts)
            file.flush()
            index = build_index(file.name, known_facts=facts)
        info = index.info._replace(shard=os.path.basename(path))
        ShardIndex(path, info, index.columns).save(index_path)
        storage.forget(path)
        paths.append(path)
    return paths


def _fill(
    file: BinaryIO, sample: Raw | None, rest: Iterator[Raw], *, limits: tuple[int, int], facts: dict[str, VideoFacts]
) -> Raw | None:
    """Write samples until one of the limits (samples, bytes) is reached; return the first that is left over."""
    from webdataset.writer import TarWriter  # a second of imports that reading does not need

    keys, num_bytes = set[str](), 0
    with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
        while sample is not None and len(keys) < limits[0] and (not keys or num_bytes + len(sample.video) <= limits[1]):
            if sample.key in keys:
                raise ValueError(f"key {sample.key!r} comes twice in {os.path.basename(file.name)}; keys must differ.")
            writer.write({"__key__": sample.key} | _members(sample))
            if sample.facts:
                facts[sample.key] = sample.facts
            keys.add(sample.key)
            num_bytes += len(sample.video)
            sample = next(rest, None)
    return sample


def _members(sample: Raw) -> dict[str, bytes]:
    if sample.extension not in (*VIDEOS, *STILLS):
        allowed = ", ".join((*VIDEOS, *STILLS))
        raise ValueError(f"extension {sample.extension!r} of key {sample.key!r} is not one of {allowed}.")
    try:
        name = f"{sample.key}.{sample.extension}"
        if check_name(name) != name or split_name(name) != (sample.key, sample.extension):
            raise ValueError("a dot, or './' at its start")
        record = json.dumps(sample.meta, ensure_ascii=False, allow_nan=False).encode()
        text = parse_meta(None, record)["captions"][0].encode()
    except MetaError as error:
        raise ValueError(f"the meta of key {sample.key!r} cannot be written: {error}.") from error
    except ValueError as error:
        raise ValueError(f"key {sample.key!r} cannot be written: {error}.") from error
    return {sample.extension: sample.video, "json": record, "txt": text}
