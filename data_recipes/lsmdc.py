"""LSMDC 2016: clips of films with one sentence each. Splits: 101,079 / 7,408 / 1,000 (retrieval) or 10,053.

Format: LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_annos_test.csv and
LSMDC16_challenge_1000_publictect.csv (the 1,000 test clips of retrieval, spelt so): TAB between clip, start_aligned,
end_aligned, start_extracted, end_extracted and sentence, no header, in cp1252 where not in UTF-8. A clip
0001_American_Beauty_00.00.51.926-00.00.54.129 is a file of this name in the folder 0001_American_Beauty.
Source: the README of the LSMDC 2016 download (movie description task), arXiv:1605.03705.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe

_COLUMNS = ("clip", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence")


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the lines."""
    return csv_rows(path, delimiter="\t", header=_COLUMNS, quoted=False, encoding=options.encoding)


def items(row: dict[str, str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the item of one line."""
    clip = row["clip"].strip()
    film = clip.rpartition("_")[0]
    yield Item(clip, f"{film}/{clip}", [row["sentence"]], fields={"film": film})


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoding", default="utf-8-sig", help="of the annotations (default: utf-8); cp1252 is another"
    )


RECIPE = Recipe(
    name="lsmdc",
    about="LSMDC 2016: LSMDC16_annos_*.csv; clips in one folder a film, as they were downloaded.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
