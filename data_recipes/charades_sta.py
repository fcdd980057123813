"""Charades-STA: sentences with the moment of a video that they describe. Splits: 12,408 / 3,720 sentences.

Format: charades_sta_train.txt, charades_sta_test.txt: a line `ID start end##sentence`; files are ID.mp4 of Charades.
Source: the README of the authors' repository (jiyanggao/TALL), arXiv:1705.02101.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import text_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, add_unit, moment, unit_items


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the lines."""
    return text_rows(path)


def items(row: str, options: argparse.Namespace) -> Iterable[Item]:
    """Yield the video with this moment, or the moment as a clip."""
    place, mark, sentence = row.partition("##")
    if not mark:
        raise ValueError("no ## before the sentence")
    name, start_s, end_s = place.split()
    event = moment(sentence, float(start_s), float(end_s))
    return unit_items(options.unit, Item(name, name, [event["text"]]), [event])


def arguments(parser: argparse.ArgumentParser) -> None:
    add_unit(parser, default="video")


RECIPE = Recipe(
    name="charades_sta",
    about="Charades-STA: charades_sta_train.txt, charades_sta_test.txt; videos with moments, or moments as clips.",
    splits=("train", "test"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
