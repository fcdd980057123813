"""CC3M and CC12M: pictures with captions, of the web.

Format: TSV without a header; CC3M (Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv) holds caption, url and
CC12M (cc12m.tsv) holds url, caption. The files have no names of their own: either --files, a TSV of url and file, tells
them, or they are called by the number of their line from 0, with nine digits, as img2dataset does with 10,000 a folder.
Source: the download pages of Conceptual Captions and Conceptual 12M (google-research-datasets), arXiv:2102.08981.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows
from data_recipes.build import main
from data_recipes.items import Dropped, Item, Recipe


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (number of the line, caption, file or None)."""
    named = csv_rows(options.files, delimiter="\t", header=("url", "file"), quoted=False) if options.files else ()
    files = {row["url"].strip(): row["file"].strip() for _, row in named if "file" in row}
    rows = csv_rows(path, delimiter="\t", header=("first", "second"), quoted=False)
    for number, (where, row) in enumerate(rows):
        one, two = row.get("first", "").strip(), row.get("second", "").strip()
        url, caption = (one, two) if one.startswith(("http://", "https://")) else (two, one)
        if options.files and url not in files:
            yield where, Dropped(f"{number:09d}", where, "video_missing", f"{options.files} has no file of {url}")
        else:
            yield where, (f"{number:09d}", caption, files.get(url))


def items(row: tuple[str, str, str | None], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the item of one line."""
    number, caption, file = row
    yield Item(number, file or number, [caption])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--files", metavar="TSV", help="url and file of each picture, if files are not numbers of lines"
    )


RECIPE = Recipe(
    name="cc",
    about="CC3M and CC12M: a TSV of captions and urls, and a folder of the pictures.",
    splits=("train", "val"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
