"""Lists of clips with the number of their class, as most code for action recognition reads them.

Format: a line `PATH NUMBER` or `PATH,NUMBER` a clip, PATH below the folder of videos, NUMBER from 0 in the order of
the classes (--classes FILE: a name a line, or `NUMBER NAME` from 0 or 1). A header `path,label` is passed over.
Source: the README of MMAction2 (open-mmlab/mmaction2) on Kinetics, UCF101, HMDB51 and Something-Something.
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
    """Yield (line, names of the classes)."""
    classes = read_classes(options.classes)
    return ((where, (line, classes)) for where, line in text_rows(path) if line.lower() != "path,label")


def read_classes(path: str) -> list[str]:
    """Return the names in their order. Raises ValueError."""
    lines = [line for _, line in text_rows(path)]
    numbered = [re.fullmatch(r"(\d+)[ ,](.+)", line) for line in lines]
    if all(numbered) and [int(found[1]) for found in numbered if found] in (
        list(range(len(lines))),
        list(range(1, len(lines) + 1)),
    ):
        lines = [found[2].strip() for found in numbered if found]
    if len(set(lines)) != len(lines) or not lines:
        raise ValueError(f"--classes {path!r} holds {len(lines)} names, {len(set(lines))} of them different.")
    return lines


def items(row: tuple[str, list[str]], options: argparse.Namespace) -> Iterable[Item]:
    """Yield one clip."""
    line, classes = row
    found = re.fullmatch(r"(.+?)[ ,]+(\d+)", line)
    if found is None or int(found[2]) >= len(classes):
        raise ValueError(f"{line!r} is not `PATH NUMBER` with a number below {len(classes)}")
    yield labelled(re.sub(r"\.\w{2,4}$", "", found[1]), found[1], classes[int(found[2])])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", required=True, metavar="FILE", help="names of the classes in their order")


RECIPE = Recipe(
    name="action_lists",
    about="Lists of `PATH NUMBER` and the names of the classes: any data of action recognition.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
    lists={"classes.txt": "label"},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
