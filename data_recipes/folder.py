"""A folder of your own videos or pictures with captions: a table, or a .txt beside each video.

Format: that of `vlp.data.caption_table`: .csv or .jsonl with a column that names the video (video, key, file, path,
name, id) and one that holds the caption (caption, captions, text, sentence), or one caption a line in a .txt. The test
split is chosen by the hash of the keys.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.build import main
from data_recipes.items import Dropped, Item, Recipe
from data_recipes.videos import Videos, extension_of
from vlp.data.caption_table import Clip, match
from vlp.data.rows import STILLS, VIDEOS

HELD = (*VIDEOS, *STILLS, "txt")  # what a caption table may name, and captions beside a video


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the videos that have captions, and what is lost."""
    paths = [path for path in Videos(options.videos, texts=True).files if extension_of(path) in HELD]
    clips, lost = match(options.videos, paths, path or None)
    order = sorted(clips, key=lambda clip: hashlib.sha256(clip.key.encode()).digest())
    held_out = {clip.key for clip in order[: int(options.holdout * len(clips) + 1e-9)]}
    for item in lost:
        yield item.where, Dropped(item.key, item.where, item.reason.name.lower(), item.detail)
    for clip in clips:
        yield clip.path, (clip, "test" if clip.key in held_out else "train")


def items(row: tuple[Clip, str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the item of one video."""
    clip, split = row
    fields = {name: value for name, value in clip.meta.items() if name != "captions"}
    yield Item(clip.key, clip.path, clip.meta["captions"], fields=fields, split=split)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--holdout", type=_share, default=0.1, metavar="SHARE", help="of test clips (default: 0.1)")


def _share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return float(text)


RECIPE = Recipe(
    name="folder",
    about="A folder of videos with captions: --captions FILE.csv, FILE.jsonl, or a .txt beside each video.",
    splits=("train", "test"),
    read=read,
    items=items,
    arguments=arguments,
    flag="--captions",
    file_splits=False,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
