"""YouCook2: cooking videos with the steps of recipes. Splits: 1,333 / 457 videos, about 9.6k / 3.3k clips.

Format: youcookii_annotations_trainval.json: {"database": {ID: {"subset": training or validation, "recipe_type",
"duration", "annotations": [{"segment": [start, end], "id", "sentence"}]}}}; files are ID.mp4 or ID.mkv in any folder.
Source: the README of the annotation archive (youcook2.eecs.umich.edu), arXiv:1703.09788.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import load_json
from data_recipes.build import main
from data_recipes.items import Item, Recipe, add_unit, moment, unit_items

_NAMES = {"training": "train", "validation": "val"}


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (name, annotation) of each video; those of the test split have no sentences."""
    for name, video in load_json(path)["database"].items():
        if video["subset"] in _NAMES:
            yield f"{path}: {name}", (name, video)


def items(row: tuple[str, dict[str, Any]], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the steps as clips, or the video with its steps."""
    name, video = row
    events = [moment(step["sentence"], *step["segment"]) for step in video["annotations"]]
    fields = {"recipe_type": str(video.get("recipe_type", ""))}
    item = Item(name, name, [event["text"] for event in events], fields=fields, split=_NAMES[video["subset"]])
    return unit_items(options.unit, item, events)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_unit(parser, default="clip")


RECIPE = Recipe(
    name="youcook2",
    about="YouCook2: youcookii_annotations_trainval.json; steps as clips, or videos with steps.",
    splits=("train", "val"),
    read=read,
    items=items,
    arguments=arguments,
    file_splits=False,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
