"""NExT-QA: why and how things happen, with five options or open. Splits: 34,132 / 4,996 / 8,564 questions (options).

Format: train.csv, val.csv, test.csv with the header video,frame_count,width,height,question,answer,qid,type and, where
there are options, a0 to a4; answer is then a position from 0 or, in NExT-GQA, the text of the option. Files are
video.mp4, or what --mapping map_vid_vidorID.json says, {"ID": "folder/ID"}.
Source: the README and loaders of the authors' repository (doc-doc/NExT-QA), arXiv:2105.08276.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows, load_json
from data_recipes.build import main
from data_recipes.items import Item, Recipe, asked, choice, chosen, question

_NUM_OPTIONS = 5


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (line, name of its file)."""
    files = load_json(options.mapping) if options.mapping else {}
    for where, row in csv_rows(path, columns=("video", "question", "answer", "qid", "type")):
        yield where, (row, files.get(row.get("video"), row.get("video")))


def items(row: tuple[dict[str, str], str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the video with one question."""
    line, file = row
    text, more = line["question"], {"qid": line["qid"], "type": line["type"]}
    if "a0" in line:
        answers = [line[f"a{number}"] for number in range(_NUM_OPTIONS)]
        answer = line["answer"]
        position = answers.index(answer) if answer in answers else int(answer)
        yield chosen(line["video"], file, [choice(text, answers, position, **more)])
    else:
        yield asked(line["video"], file, [question(text, line["answer"], **more)])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mapping", metavar="JSON", help="map_vid_vidorID.json, if files lie in folders of VidOR")


RECIPE = Recipe(
    name="next_qa",
    about="NExT-QA: train.csv, val.csv, test.csv, with options or open.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
