"""UCF101: 13,320 clips of 101 actions. Splits, of each of three: about 9.5k / 3.8k (the first: 9,537 / 3,783).

Format: trainlist01.txt with lines `CLASS/v_CLASS_g08_c01.avi 1`, testlist01.txt with lines `CLASS/v_CLASS_g01_c01.avi`;
02 and 03 are the other two splits. Files are as the lists say, or in any folders.
Source: the README of UCF101TrainTestSplits-RecognitionTask.zip, arXiv:1212.0402.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import text_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, labelled


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the lines; the name of the list tells the split."""
    split = next((split for split in ("train", "test") if f"{split}list" in path.rpartition("/")[2]), "")
    if not split:
        raise ValueError(f"{path!r} is neither trainlistNN.txt nor testlistNN.txt.")
    return ((where, (line, split)) for where, line in text_rows(path))


def items(row: tuple[str, str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield one clip."""
    line, split = row
    found = re.fullmatch(r"(\w+)/(\S+)\.avi(?: \d+)?", line)
    if found is None:
        raise ValueError(f"{line!r} is not `CLASS/NAME.avi`")
    yield labelled(found[2], f"{found[1]}/{found[2]}", found[1])._replace(split=split)


RECIPE = Recipe(
    name="ucf101",
    about="UCF101: trainlist01.txt, testlist01.txt (or 02, 03).",
    splits=("train", "test"),
    read=read,
    items=items,
    file_splits=False,
    lists={"classes.txt": "label"},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
