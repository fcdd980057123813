"""ActivityNet Captions: long videos with sentences in time. Splits: 10,009 / 4,917 (val_1) / 4,885 (val_2).

Format: train.json, val_1.json, val_2.json: {"v_ID": {"duration": s, "timestamps": [[start, end]], "sentences": [..]}}.
Both val files describe the same videos. Papers on retrieval train on train and test on val_1, with all sentences joined
into one paragraph, which is the caption here; with --texts sentences each sentence is a caption of the video.
Source: the download page of the dataset (Krishna et al., arXiv:1705.00754).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import json_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, add_unit, moment, unit_items


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (name, annotation) of each video."""
    return json_rows(path)


def items(row: tuple[str, dict[str, Any]], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the video with its paragraph and its events, or the events as clips."""
    name, video = row
    spans = [sorted(span) for span in video["timestamps"]]  # a few are written backwards
    events = [moment(text, *span) for text, span in zip(video["sentences"], spans, strict=True)]
    sentences = [event["text"] for event in events]
    captions = [" ".join(sentences)] if options.texts == "paragraph" else sentences
    return unit_items(options.unit, Item(name, name, captions), events)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_unit(parser, default="video")
    text = "captions of a whole video: all sentences as one, or each (default: paragraph)"
    parser.add_argument("--texts", choices=("paragraph", "sentences"), default="paragraph", help=text)


RECIPE = Recipe(
    name="activitynet_captions",
    about="ActivityNet Captions: train.json, val_1.json, val_2.json; videos with events, or events as clips.",
    splits=("train", "val_1", "val_2"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
