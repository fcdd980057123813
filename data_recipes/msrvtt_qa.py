"""MSRVTT-QA: open questions about the clips of MSR-VTT. Splits: 158,581 / 12,278 / 72,821 questions.

Format: train_qa.json, val_qa.json, test_qa.json: lists of id, video_id (a number: files are videoN.mp4), category_id,
question and answer (one word).
Source: the README of the authors' repository (xudejing/video-question-answering), ACM Multimedia 2017.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import json_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, asked, question


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the elements."""
    return json_rows(path)


def items(row: dict[str, Any], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the clip with one question."""
    name = f"video{int(row['video_id'])}"
    yield asked(name, name, [question(row["question"], row["answer"], id=row["id"])])


RECIPE = Recipe(
    name="msrvtt_qa",
    about="MSRVTT-QA: train_qa.json, val_qa.json, test_qa.json; videos of MSR-VTT.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
