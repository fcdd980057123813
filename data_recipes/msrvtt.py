"""MSR-VTT: 10,000 clips with 20 captions each. Splits: the full 6,513 / 497 / 2,990, or 1k-A by two CSV files.

Format: train_val_videodatainfo.json and test_videodatainfo.json (or both in one file) hold "videos" with video_id,
split (train, validate, test) and category, and "sentences" with video_id and caption; clips are video_id.mp4. The split
1k-A, 9,000 for training and 1,000 for the test, is MSRVTT_train.9k.csv with a column video_id and
MSRVTT_JSFUSION_test.csv with video_id and sentence, the one caption that a test clip is searched by.
Source: arXiv papers on retrieval since JSFusion (ECCV 2018), files as in the CLIP4Clip release (ArrowLuo/CLIP4Clip).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows, load_json
from data_recipes.build import main
from data_recipes.items import Item, Recipe

_NAMES = {"train": "train", "validate": "val", "test": "test"}


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (sentence, what is known of its video)."""
    data = load_json(path)
    videos = {video["video_id"]: video for video in data["videos"]}
    splits = {name: _NAMES.get(video["split"], "") for name, video in videos.items()}
    told: dict[str, str] = {}
    if options.train_csv or options.test_csv:
        splits = dict.fromkeys(videos, "")
        splits |= {row["video_id"]: "train" for row in _listed(options.train_csv)}
        told = {row["video_id"]: row["sentence"] for row in _listed(options.test_csv)}
        splits |= dict.fromkeys(told, "test")
    for number, sentence in enumerate(data["sentences"]):
        name = sentence["video_id"]
        if splits[name]:
            caption = told.get(name, sentence["caption"])
            yield f"{path} sentence {number}", (name, caption, splits[name], videos[name].get("category"))


def _listed(path: str | None) -> list[dict[str, str]]:
    return [row for _, row in csv_rows(path, columns=("video_id",))] if path else []


def items(row: tuple[str, str, str, int | None], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the item of one sentence."""
    name, caption, split, category = row
    yield Item(name, name, [caption], fields={} if category is None else {"category": category}, split=split)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train-csv", metavar="CSV", help="of the split 1k-A: MSRVTT_train.9k.csv (or 7k)")
    parser.add_argument("--test-csv", metavar="CSV", help="of the split 1k-A: MSRVTT_JSFUSION_test.csv")


RECIPE = Recipe(
    name="msrvtt",
    about="MSR-VTT: videodatainfo.json; the full split, or 1k-A with --train-csv and --test-csv.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
    file_splits=False,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
