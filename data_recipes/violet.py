"""VIOLET's own data: frames as JPEG in TSV files, and texts in JSON; WebVid, CC3M and the tasks that it is tuned on.

Format: --videos holds img_*.tsv (and .lineidx), see `data_recipes.packed`. --annotations txt_*.json is an object with a
member for each split: to pretrain {id: [caption, ...]}; for a task a list of {video, caption}, of {video, question,
answer} or of {video, question, option_0, ..., answer}. Of an open answer that is a number, "ans2label" tells the word.
Source: tsujuifu/pytorch_violet (_data, dataset.py, main_*.py) and tsujuifu/pytorch_empirical-mvm, arXiv:2111.12681.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data_recipes.annotations import load_json
from data_recipes.build import main
from data_recipes.items import Item, Recipe, asked, choice, chosen, question

SPLITS = ("train", "val", "test")


def read(path: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (split, id, captions) or (split, element, answers by number)."""
    data = load_json(path)
    if not isinstance(data, dict) or not any(split in data for split in SPLITS):
        raise ValueError(f"{path!r} has none of {', '.join(SPLITS)}; give txt_NAME.json.")
    words = {number: word for word, number in data.get("ans2label", {}).items()}
    for split in (name for name in SPLITS if name in data):
        if isinstance(data[split], dict):
            yield from ((f"{path}: {split} {key}", (split, key, texts)) for key, texts in data[split].items())
        else:
            rows = enumerate(data[split])
            yield from ((f"{path}: {split} element {number}", (split, row, words)) for number, row in rows)


def items(row: tuple[str, Any, Any], options: argparse.Namespace) -> Iterable[Item]:
    """Yield the video with its captions, or with one caption or question."""
    split, what, more = row
    if isinstance(what, str):
        yield Item(what, what, list(more), split=split)
        return
    name = str(what["video"])
    if "question" not in what:
        texts = what["caption"]
        yield Item(name, name, [" ".join(texts) if isinstance(texts, list) else texts], split=split)
    elif "option_0" in what:
        answers = [what[f"option_{number}"] for number in range(sum(key.startswith("option_") for key in what))]
        yield chosen(name, name, [choice(what["question"], answers, int(what["answer"]))], split=split)
    else:
        answer = what["answer"]
        word = answer if isinstance(answer, str) else more[answer]
        yield asked(name, name, [question(what["question"], word)], split=split)


RECIPE = Recipe(
    name="violet",
    about="VIOLET's data: a folder with img_*.tsv, and txt_*.json.",
    splits=SPLITS,
    read=read,
    items=items,
    file_splits=False,
    packed=True,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
