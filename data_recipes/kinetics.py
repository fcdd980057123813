"""Kinetics-400, 600 and 700: clips of ten seconds, each of one class of action. Splits of 400: about 240k / 20k / 39k.

Format: train.csv, validate.csv (or val.csv), test.csv with label, youtube_id, time_start, time_end. Files are
ID_000001_000011.mp4, with start and end in six digits, in any folders; or, with --whole, the whole video ID.mp4, of
which the clip is cut out. Lists that another tool has made, `PATH NUMBER`, are of the recipe action_lists.
Source: the files of the authors (deepmind.com, research, kinetics), arXiv:1705.06950.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, labelled


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the lines."""
    return csv_rows(path, columns=("label", "youtube_id", "time_start", "time_end"))


def items(row: dict[str, str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield one clip."""
    start_s, end_s = round(float(row["time_start"])), round(float(row["time_end"]))
    key = f"{row['youtube_id']}_{start_s:06d}_{end_s:06d}"
    item = labelled(key, row["youtube_id"] if options.whole else key, row["label"])
    yield item._replace(span=(start_s, end_s) if options.whole else None)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--whole", action="store_true", help="files are whole videos, ID.mp4: cut the clips out")


RECIPE = Recipe(
    name="kinetics",
    about="Kinetics-400, 600, 700: train.csv, validate.csv, test.csv; clips ID_start_end.mp4, or whole videos.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
    lists={"classes.txt": "label"},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
