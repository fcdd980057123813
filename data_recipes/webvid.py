"""WebVid-2M and WebVid-10M, and any CSV of the same columns.

Format: results_2M_train.csv with the header videoid,contentUrl,duration,page_dir,name; files are page_dir/videoid.mp4.
Source: the README of the WebVid repository (m-bain/webvid), arXiv:2104.00650.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the lines."""
    return csv_rows(path, columns=("videoid", "name"))


def items(row: dict[str, str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the item of one line."""
    folder = row.get("page_dir", "").strip("/")
    yield Item(row["videoid"], f"{folder}/{row['videoid']}".lstrip("/"), [row["name"]])


RECIPE = Recipe(
    name="webvid",
    about="WebVid CSV files: videoid, name and page_dir; videos as page_dir/videoid.mp4 or videoid.mp4.",
    splits=("train", "val"),
    read=read,
    items=items,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
