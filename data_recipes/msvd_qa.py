"""MSVD-QA: open questions about the clips of MSVD. Splits: 30,933 / 6,415 / 13,157 questions.

Format: train_qa.json, val_qa.json, test_qa.json: lists of id, video_id (a number), question and answer (one word).
Files are vidN.avi, or have the names of MSVD if --mapping youtube_mapping.txt is given, with lines `NAME vidN`.
Source: the README of the authors' repository (xudejing/video-question-answering), ACM Multimedia 2017.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import json_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, asked, question
from data_recipes.msvd import read_mapping


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (element, names of files by vidN)."""
    names = {alias: name for name, alias in read_mapping(options.mapping).items()}
    return ((where, (row, names)) for where, row in json_rows(path))


def items(row: tuple[dict[str, Any], dict[str, str]], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the clip with one question."""
    element, names = row
    alias = f"vid{int(element['video_id'])}"
    asked_here = [question(element["question"], element["answer"], id=element["id"])]
    yield asked(alias, names[alias] if names else alias, asked_here)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mapping", metavar="FILE", help="youtube_mapping.txt, if files have the names of MSVD")


RECIPE = Recipe(
    name="msvd_qa",
    about="MSVD-QA: train_qa.json, val_qa.json, test_qa.json; videos of MSVD.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
