"""From annotations and a folder of videos to the list of shards to make, a pure function of both and the options.

    annotation files --recipe--> items by (split, key) --folder--> files --N a shard--> jobs
                          \\                                \\--> dropped: what is missing or refused
                           \\--> dropped: rows that are broken

An item without a file keeps its place, so that a video that is downloaded later changes one shard and no other.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from data_recipes.annotations import named_splits
from data_recipes.encode import Encoding
from data_recipes.items import Dropped, Item, Recipe, joined, safe_keys
from data_recipes.shard_jobs import Job, Work
from data_recipes.videos import Refused, Videos
from vlp.data.caption_table import printable

_BROKEN = (KeyError, ValueError, TypeError, IndexError, AttributeError)  # what a row of the wrong shape raises
# Options that say where and how fast, not what is made.
_FREE = frozenset({"videos", "out", "annotations", "workers", "dry_run", "overwrite", "splits"})


class Plan(NamedTuple):
    """What a run will do."""

    items: dict[str, list[Item]]  # by split
    jobs: dict[str, list[Job]]  # by split
    dropped: list[Dropped]
    identity: dict[str, Any]  # options, and a digest of the items of each split
    lists: dict[str, list[str]]  # name of a text file -> its lines, such as the classes


def make_plan(recipe: Recipe, options: argparse.Namespace) -> Plan:
    """Read all annotations and look for their videos.

    Raises:
        ValueError: an option, the folder or an annotation file cannot be used; says what to change.
    """
    encoding, videos = _encoding(options), Videos(options.videos, packed=recipe.packed)
    items, dropped = read_items(recipe, options)
    jobs: dict[str, list[Job]] = {}
    for split, group in items.items():
        keys = safe_keys(item.key for item in group)
        jobs[split] = []
        for number, first in enumerate(range(0, len(group), options.clips_per_shard)):
            work, refused = _find(group[first : first + options.clips_per_shard], keys, videos)
            dropped += refused
            jobs[split].append(Job(f"{split}-{number:06d}", options.out, options.videos, encoding, work))
    return Plan(items, jobs, dropped, _identity(recipe, options, items), _lists(recipe, items))


def _lists(recipe: Recipe, items: dict[str, list[Item]]) -> dict[str, list[str]]:
    """Return the different values of a field of all items, in order, whether their videos are there or not."""
    return {
        name: sorted({item.fields[field] for group in items.values() for item in group})
        for name, field in recipe.lists.items()
    }


def _encoding(options: argparse.Namespace) -> Encoding:
    if (options.store == "frames") != (options.frames is not None):
        raise ValueError(f"--store {options.store} with --frames {options.frames}: write --store frames --frames N.")
    if options.frames and (options.gop or options.tune):
        raise ValueError("--gop and --tune are of videos; leave them out with --store frames, or store a video.")
    keep_audio = options.audio == "keep"
    return Encoding(options.short_side, options.gop, options.fps, keep_audio, options.tune, options.frames)


def read_items(recipe: Recipe, options: argparse.Namespace) -> tuple[dict[str, list[Item]], list[Dropped]]:
    """Return the items of each wanted split, in the order of the recipe's splits, and the rows that are lost.

    Raises:
        ValueError: as `make_plan`.
    """
    wanted = options.splits or list(recipe.splits)
    unknown = [split for split in wanted if split not in recipe.splits]
    if unknown:
        raise ValueError(f"--splits {', '.join(unknown)}: {recipe.name} has {', '.join(recipe.splits)}.")
    found: dict[tuple[str, str], Item] = {}
    counts: Counter[str] = Counter()
    dropped: list[Dropped] = []
    for item in tqdm(_all_items(recipe, options), desc="reading annotations", unit="row", disable=None, leave=False):
        if item.split not in wanted:
            continue
        if isinstance(item, Dropped):
            dropped.append(item)
            continue
        place = (item.split, item.key)
        if place in found:
            found[place] = joined(found[place], item)
        elif options.max_items is None or counts[item.split] < options.max_items:
            found[place] = item
            counts[item.split] += 1
    if not found and not dropped:
        raise ValueError(f"the annotations hold nothing of the splits {', '.join(wanted)}.")
    items = {split: [item for item in found.values() if item.split == split] for split in recipe.splits}
    return {split: group for split, group in items.items() if group}, dropped


def _all_items(recipe: Recipe, options: argparse.Namespace) -> Iterator[Item | Dropped]:
    sources = named_splits(options.annotations, recipe.splits, one_a_file=recipe.file_splits) or [("", "")]
    for path, split in sources:
        rows = recipe.read(path, options)
        while True:
            try:
                where, row = next(rows, ("", None))
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(f"{path!r} is not what {recipe.name} reads: {_words(error)}.") from error
            if not where:
                break
            if isinstance(row, Dropped):
                yield row._replace(split=row.split or split or recipe.splits[0])
                continue
            try:
                yield from [_of_split(item, item.split or split, recipe) for item in recipe.items(row, options)]
            except _BROKEN as error:
                yield Dropped("", where, "annotation_broken", _words(error), split or recipe.splits[0])


def _of_split(item: Item, split: str, recipe: Recipe) -> Item:
    if split not in recipe.splits:
        raise ValueError(f"{item.key!r} is of the split {split!r}, which {recipe.name} does not have")
    return item._replace(split=split)


def _words(error: Exception) -> str:
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return printable(text)


def _find(items: list[Item], keys: dict[str, str], videos: Videos) -> tuple[list[Work], list[Dropped]]:
    work, dropped = [], []
    for item in items:
        file = videos.find(item.file)
        if isinstance(file, Refused):
            dropped.append(Dropped(printable(item.key), printable(item.file), file.reason, file.detail, item.split))
        else:
            work.append(Work(keys[item.key], item, file))
    return work, dropped


def _identity(recipe: Recipe, options: argparse.Namespace, items: dict[str, list[Item]]) -> dict[str, Any]:
    known = {name: value for name, value in sorted(vars(options).items()) if name not in _FREE}
    known = {name: os.path.basename(value) if _is_path(value) else value for name, value in known.items()}
    return {
        "recipe": recipe.name,
        "options": known,
        "splits": {split: _digest(group) for split, group in items.items()},
    }


def _is_path(value: object) -> bool:
    return isinstance(value, str) and os.sep in value  # what a recipe reads from it is part of the items


def _digest(items: list[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()[:32]
