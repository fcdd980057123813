"""MSVD (YouTube2Text): 1,970 clips with about 40 captions each. Splits: 1,200 / 100 / 670.

Format: either AllVideoDescriptions.txt, a line `NAME caption` where NAME is id_start_end and lines with # are comments,
or video_corpus.csv with VideoID, Start, End, Language and Description. Files are NAME.avi, or vidN.avi after
youtube_mapping.txt with lines `NAME vidN`. The splits are lists of names (--lists train_list.txt val_list.txt
test_list.txt, one NAME a line) or, with the mapping alone, vid1-1200, vid1201-1300 and vid1301-1970.
Source: the project page of Chen and Dolan (ACL 2011); lists as in CLIP4Clip, the mapping as in
MSVD-QA (xudejing/video-question-answering).
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import csv_rows, named_splits, text_rows
from data_recipes.build import main
from data_recipes.items import Dropped, Item, Recipe

SPLITS = ("train", "val", "test")
_LAST = {"train": 1200, "val": 1300, "test": 1970}  # numbers of the mapping


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (name, caption, split, names of the file) of the captions in English."""
    mapping = read_mapping(options.mapping)
    splits = {name: split_of(alias) for name, alias in mapping.items()}
    for file, split in named_splits(options.lists or [], SPLITS, one_a_file=True):
        splits |= {line.removesuffix(".avi"): split for _, line in text_rows(file)}
    if not splits:
        raise ValueError("the split is not told; give --lists train=FILE test=FILE, or --mapping youtube_mapping.txt.")
    for where, name, caption in _captions(path):
        if name not in splits:
            yield where, Dropped(name, where, "annotation_broken", "no list has this clip")
        else:
            yield where, (name, caption, splits[name], mapping.get(name) if options.numbered else name)


def read_mapping(path: str | None) -> dict[str, str]:
    """Return vidN by NAME. Raises ValueError."""
    lines = [line.split() for _, line in text_rows(path)] if path else []
    if not all(len(words) == 2 for words in lines):
        raise ValueError(f"{path!r} is no mapping; its lines are `NAME vidN`.")
    return dict(lines)


def split_of(alias: str) -> str:
    """Return the split of vidN. Raises ValueError if there is no such clip."""
    number = int(re.sub(r"\D", "", alias) or 0)
    found = [split for split, last in _LAST.items() if 1 <= number <= last]
    if not found:
        raise ValueError(f"{alias!r} is none of vid1 to vid1970.")
    return found[0]


def _captions(path: str) -> Iterator[tuple[str, str, str]]:
    if not path.lower().endswith(".csv"):
        for where, line in text_rows(path):
            name, _, caption = line.partition(" ")
            if not line.startswith("#"):
                yield where, name, caption
        return
    for where, row in csv_rows(path, columns=("VideoID", "Start", "End", "Language", "Description")):
        if row["Language"] == "English":
            yield where, f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"]


def items(row: tuple[str, str, str, str], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the item of one caption."""
    name, caption, split, file = row
    yield Item(name, file, [caption], split=split)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lists", nargs="+", metavar="FILE", help="SPLIT=FILE or FILE: names of the clips of a split")
    parser.add_argument("--mapping", metavar="FILE", help="youtube_mapping.txt")
    parser.add_argument("--numbered", action="store_true", help="files are called vidN, as the mapping says")


RECIPE = Recipe(
    name="msvd",
    about="MSVD: AllVideoDescriptions.txt or video_corpus.csv; splits by --lists or --mapping.",
    splits=SPLITS,
    read=read,
    items=items,
    arguments=arguments,
    file_splits=False,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
