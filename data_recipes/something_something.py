"""Something-Something v2: clips of 174 actions with objects. Splits: 168,913 / 24,777; those to test on have no label.

Format: train.json and validation.json (before: something-something-v2-train.json), lists of id, label ("putting cup on
table"), template ("Putting [something] on [something]") and placeholders. Files are ID.webm.
Source: the instructions of the download (developer.qualcomm.com, before 20bn.com), arXiv:1706.04261.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import json_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, labelled


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the elements."""
    return json_rows(path)


def items(row: dict[str, Any], options: argparse.Namespace) -> Iterable[Item]:
    """Yield one clip: its label is its caption, its template, without the brackets, the class of its action."""
    template = row["template"].replace("[", "").replace("]", "")
    item = labelled(str(row["id"]), str(row["id"]), row["label"])
    yield item._replace(fields={**item.fields, "template": template, "placeholders": row.get("placeholders", [])})


RECIPE = Recipe(
    name="something_something",
    about="Something-Something v2: train.json, validation.json.",
    splits=("train", "val"),
    read=read,
    items=items,
    lists={"labels.txt": "label", "templates.txt": "template"},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
