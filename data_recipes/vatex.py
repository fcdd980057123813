"""VATEX: 10-second clips with ten captions in English and ten in Chinese. Splits: 25,991 / 3,000 / 6,000 (public test).

Format: vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json: lists of videoID
(youtube id, start and end in six digits), enCap and chCap; files are videoID.mp4, cut already.
Source: the download page of the dataset, arXiv:1904.03493.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import json_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the elements."""
    return json_rows(path)


def items(row: dict[str, Any], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the item of one clip."""
    yield Item(row["videoID"], row["videoID"], list(row["chCap" if options.language == "zh" else "enCap"]))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the captions (default: en)")


RECIPE = Recipe(
    name="vatex",
    about="VATEX: the JSON files of the download page; clips as videoID.mp4.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
