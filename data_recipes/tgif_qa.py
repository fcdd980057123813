"""TGIF-QA: questions about animated GIFs, four tasks: action, transition, count, frameqa. Splits: train, test.

Format: Train_action_question.csv and so on, TAB between fields, with a header: gif_name, question, a1 to a5 (action and
transition only), answer (a position from 0, a number, or a word), vid_id, and for frameqa type. GIFs become mp4 here.
action and transition become "choices", count and frameqa "questions"; each has its task. Files of several tasks may be
given at once, then a clip has the questions of all.
Source: dataset/README.md of the authors' repository (YunseokJANG/tgif-qa), arXiv:1704.04497.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, asked, choice, chosen, question

_TASKS = ("action", "transition", "count", "frameqa")
_NUM_OPTIONS = 5


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (line, task)."""
    task = next((task for task in _TASKS if task in os.path.basename(path).lower()), "")
    rows = csv_rows(path, delimiter="\t", columns=("gif_name", "question", "answer"), quoted=False)
    return ((where, (row, task)) for where, row in rows)


def items(row: tuple[dict[str, str], str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the clip with one question."""
    line, task = row
    name, text = line["gif_name"].strip(), line["question"]
    if "a1" in line:
        answers = [line[f"a{number}"] for number in range(1, _NUM_OPTIONS + 1)]
        yield chosen(name, name, [choice(text, answers, int(line["answer"]), task=task)])
    else:
        yield asked(name, name, [question(text, line["answer"], task=task)])


RECIPE = Recipe(
    name="tgif_qa",
    about="TGIF-QA: Train_*_question.csv and Test_*_question.csv; GIFs are encoded as mp4.",
    splits=("train", "test"),
    read=read,
    items=items,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
