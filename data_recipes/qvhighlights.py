"""QVHighlights: queries with the moments of a 150-second video that fit, and how well. Splits: 7,218 / 1,550 / 1,542.

Format: highlight_train_release.jsonl, highlight_val_release.jsonl, highlight_test_release.jsonl: lines of qid, query,
duration, vid (youtube id, start and end), relevant_windows, relevant_clip_ids (of two seconds each) and saliency_scores
(three annotators, 0 to 4); the test has only the first four. Files are vid.mp4, cut already.
In key.json, "events" holds one element a window, with its qid, and "highlights" the clips and scores of each query.
Source: data/README.md of the authors' repository (jayleicn/moment_detr), arXiv:2107.09609.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import jsonl_rows
from data_recipes.build import main
from data_recipes.items import Item, Recipe, add_unit, moment, unit_items


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the lines."""
    return jsonl_rows(path)


def items(row: dict[str, Any], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the video with one of its queries, or the moments of the query as clips."""
    query, qid = row["query"].strip(), row["qid"]
    events = [moment(query, *window, qid=qid) for window in row.get("relevant_windows", [])]
    highlight = {"text": query, "qid": qid}
    if "saliency_scores" in row:
        highlight |= {"clip_ids": row["relevant_clip_ids"], "saliency": row["saliency_scores"]}
    return unit_items(options.unit, Item(row["vid"], row["vid"], [query], fields={"highlights": [highlight]}), events)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_unit(parser, default="video")


RECIPE = Recipe(
    name="qvhighlights",
    about="QVHighlights: highlight_*_release.jsonl; videos with queries, windows and saliency.",
    splits=("train", "val", "test"),
    read=read,
    items=items,
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
