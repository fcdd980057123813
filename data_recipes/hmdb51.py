"""HMDB51: 6,766 clips of 51 actions. Splits, of each of three: 3,570 / 1,530.

Format: CLASS_test_split1.txt, a file a class with lines `NAME.avi N`, where N is 1 for training, 2 for the test and 0
for neither; split2 and split3 are the other two splits. Files are CLASS/NAME.avi, or in any folders.
Source: the README of test_train_splits.rar (serre-lab.clps.brown.edu), Kuehne et al., ICCV 2011.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import text_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, labelled

_SPLITS = {"1": "train", "2": "test"}


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (line, class) of the clips in use; the name of the file tells the class."""
    found = re.fullmatch(r"(\w+)_test_split\d\.txt", path.rpartition("/")[2])
    if found is None:
        raise ValueError(f"{path!r} is not CLASS_test_splitN.txt.")
    return ((where, (line, found[1])) for where, line in text_rows(path) if line.split()[-1] != "0")


def items(row: tuple[str, str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield one clip."""
    line, label = row
    name, _, number = line.rpartition(" ")
    name = name.strip().removesuffix(".avi")
    yield labelled(name, f"{label}/{name}", label)._replace(split=_SPLITS[number])


RECIPE = Recipe(
    name="hmdb51",
    about="HMDB51: CLASS_test_split1.txt of all classes (or 2, 3).",
    splits=("train", "test"),
    read=read,
    items=items,
    file_splits=False,
    lists={"classes.txt": "label"},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
