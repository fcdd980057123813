"""HowTo100M: narrated videos; the captions are what is said, with its time, by speech recognition.

Format: caption.json or raw_caption.json: {ID: {"start": [s], "end": [s], "text": [..]}}; files are ID.mp4 or another
extension. The JSON is read whole, 20 GB of memory for all of HowTo100M: cut it into parts on a small machine.
Source: the README of the download archive (project page of Miech et al.), arXiv:1906.03327.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import json_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, add_unit, moment, unit_items


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (name, narration) of each video."""
    return json_rows(path)


def items(row: tuple[str, dict[str, Any]], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the video with its sentences as events, or the sentences as clips."""
    name, said = row
    times = zip(said["text"], said["start"], said["end"], strict=True)
    events = [moment(str(text), start_s, end_s) for text, start_s, end_s in times if str(text).strip()]
    return unit_items(options.unit, Item(name, name, [event["text"] for event in events]), events)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_unit(parser, default="video")


RECIPE = Recipe(
    name="howto100m",
    about="HowTo100M: caption.json or raw_caption.json; videos with narration in time, or sentences as clips.",
    splits=("train",),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
