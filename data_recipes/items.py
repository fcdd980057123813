"""What a recipe says: items, which are videos or parts of videos with captions, questions and time spans.

A recipe reads the public annotation files of one corpus and yields items, row by row. Everything else (finding the
videos, cutting, encoding, shards, the audit) is `data_recipes.build` and the same for all.
"""

import argparse
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

_MAX_KEY = 200  # characters; a name in a shard has at most 1,024 bytes


class Item(NamedTuple):
    """A sample as the annotations describe it. Items of one split with the same key are merged into one sample."""

    key: str  # any text: it becomes a key of a shard by `safe_keys`
    file: str  # below the folder of videos, with "/"; the extension may be missing or another one
    captions: list[str]  # may be empty if another item of the same key has some
    span: tuple[float, float] | None = None  # seconds to cut out; None takes the file as it is
    fields: dict[str, Any] = {}  # noqa: RUF012  more of key.json: questions, choices, events, anything else; never changed
    split: str = ""  # "" takes the split of the annotation file


class Dropped(NamedTuple):
    """Something that never becomes a sample."""

    key: str  # of the item, "" where the annotation does not tell
    where: str  # the file, and the row if there is one
    reason: str  # a Reason of `vlp.types` in lower case, or annotation_broken, path_refused, span_refused, duplicate
    detail: str
    split: str = ""


class Recipe(NamedTuple):
    """How the annotations of one corpus become items."""

    name: str
    about: str  # one line for --help
    splits: tuple[str, ...]  # their names, as papers use them; those to test on first
    read: Callable[[str, argparse.Namespace], Iterator[tuple[str, Any]]]  # path -> (where, row), see `rows`
    items: Callable[[Any, argparse.Namespace], Iterable[Item]]  # of one row; an exception costs that row only
    arguments: Callable[[argparse.ArgumentParser], Any] | None = None  # adds options of this recipe
    flag: str = "--annotations"  # of its files; the folder recipe has another, which may be left out
    packed: bool = False  # the videos are lines of .tsv files, see `data_recipes.packed`
    file_splits: bool = True  # each annotation file is of one split; False where rows tell their own
    lists: dict[str, str] = {}  # noqa: RUF012  name of a text file -> the field whose different values it lists


def merge(items: Iterable[Item]) -> dict[tuple[str, str], Item]:
    """Return the items by (split, key) in order of appearance; lists are joined without repeating an element."""
    merged: dict[tuple[str, str], Item] = {}
    for item in items:
        place = (item.split, item.key)
        known = merged.get(place)
        merged[place] = item if known is None else joined(known, item)
    return merged


def joined(known: Item, more: Item) -> Item:
    """Return an item with what both say; where they differ in a single value, the first one stays."""
    fields = dict(known.fields)
    for name, value in more.fields.items():
        fields[name] = _union(fields[name], value) if name in fields else value
    return known._replace(captions=_union(known.captions, more.captions), fields=fields)


def _union(known: Any, more: Any) -> Any:
    if not isinstance(known, list) or not isinstance(more, list):
        return known
    return known + [element for element in more if element not in known]


def safe_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return a key that a shard accepts for each: letters, digits, "_", "-", " " and "/"; different ones stay so."""
    safe: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        plain = "/".join(part for part in re.sub(r"[^\w\- /]", "_", key).split("/") if part) or "_"
        if plain in taken or len(plain) > _MAX_KEY:
            plain = f"{plain[:_MAX_KEY]}-{hashlib.sha256(key.encode(errors='replace')).hexdigest()[:12]}"
        taken.add(plain)
        safe[key] = plain
    return safe


def moment(text: str, start_s: float, end_s: float, **more: Any) -> dict[str, Any]:
    """Return an element of "events": what happens when."""
    return {"text": text.strip(), "start_s": float(start_s), "end_s": float(end_s), **more}


def add_unit(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add the option of recipes with time spans: whole videos with events, or each event cut out as a clip."""
    text = f"whole videos with their events, or one clip an event (default: {default})"
    parser.add_argument("--unit", choices=("video", "clip"), default=default, help=text)


def unit_items(unit: str, item: Item, events: list[dict[str, Any]]) -> Iterator[Item]:
    """Yield the item with its events ("video"), or a clip for each event ("clip"); clips of one span are one sample."""
    if unit == "video":
        yield item._replace(fields={**item.fields, "events": events})
        return
    for event in events:
        start_s, end_s = event["start_s"], event["end_s"]
        key = f"{item.key}_{round(1000 * start_s)}_{round(1000 * end_s)}"
        yield item._replace(key=key, captions=[event["text"]], span=(start_s, end_s))


def question(text: str, answer: str, **more: Any) -> dict[str, Any]:
    """Return an element of "questions": an open question and its answer."""
    return {"question": text.strip(), "answer": answer.strip(), **more}


def choice(text: str, options: list[str], answer: int, **more: Any) -> dict[str, Any]:
    """Return an element of "choices": a question with options, of which `answer` is the position of the right one.

    Raises:
        ValueError: there is no such option.
    """
    if not 0 <= answer < len(options):
        raise ValueError(f"answer {answer} is none of the {len(options)} options")
    return {"question": text.strip(), "options": [option.strip() for option in options], "answer": answer, **more}


def labelled(key: str, file: str, label: str) -> Item:
    """Return an item of action recognition: the class under "label", and in words as its caption.

    Raises:
        ValueError: the class has no name.
    """
    label = label.strip()
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()  # ApplyEyeMakeup, brush_hair
    if not words.strip():
        raise ValueError("the class has no name")
    return Item(key, file, [words], fields={"label": label})


def asked(key: str, file: str, questions: list[dict[str, Any]], *, split: str = "") -> Item:
    """Return an item of open questions; without captions of its own, each question with its answer is one."""
    captions = [f"{each['question']} {each['answer']}" for each in questions]
    return Item(key, file, captions, fields={"questions": questions}, split=split)


def chosen(key: str, file: str, choices: list[dict[str, Any]], *, split: str = "") -> Item:
    """Return an item of questions with options; each question with the right option is a caption."""
    captions = [f"{each['question']} {each['options'][each['answer']]}" for each in choices]
    return Item(key, file, captions, fields={"choices": choices}, split=split)
