"""DiDeMo: moments of Flickr videos, in pieces of five seconds. Splits: 8,395 / 1,065 / 1,004 videos.

Format: train_data.json, val_data.json, test_data.json: lists of annotation_id, description, video (file name) and
times, the first and last piece that each annotator chose. Papers on retrieval join all descriptions of a video into one
paragraph, which is the first caption here. An event is the moment of which an annotator's choice agrees most often.
Source: the README of the authors' repository (LisaAnne/LocalizingMoments), arXiv:1708.01641.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import json_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, add_unit, moment, unit_items

_PIECE_S = 5.0


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield all annotations of a video at once."""
    videos: dict[str, list[Any]] = {}
    for _, row in json_rows(path):
        videos.setdefault(row["video"], []).append(row)
    return ((f"{path}: {name}", (name, rows)) for name, rows in videos.items())


def items(row: tuple[str, list[Any]], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the video with its paragraph and its moments, or the moments as clips."""
    name, annotations = row
    events = []
    for each in annotations:
        (first, last), _ = Counter(map(tuple, each["times"])).most_common(1)[0]
        begin_s, end_s = first * _PIECE_S, (last + 1) * _PIECE_S
        events.append(moment(each["description"], begin_s, end_s, annotation_id=each["annotation_id"]))
    paragraph = " ".join(event["text"] for event in events)
    return unit_items(options.unit, Item(name, name, [paragraph]), events)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_unit(parser, default="video")


RECIPE = Recipe(
    name="didemo",
    about="DiDeMo: train_data.json, val_data.json, test_data.json; videos with moments, or moments as clips.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
