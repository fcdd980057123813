"""Readers of annotation files: JSON, JSON lines, CSV, TSV and plain lines; and the split that a file name tells.

Every reader yields (where, row); a row that cannot be read is a `Dropped` in the place of the row. A file that cannot
be read at all is the user's mistake and raises ValueError. Nothing is ever unpickled.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from data_recipes.items import Dropped

_MAX_FIELD = 16 << 20  # characters of a CSV field; the default of 131,072 is less than some transcripts
_WORDS = {"training": "train", "validation": "val", "validate": "val", "valid": "val", "testing": "test", "dev": "val"}


def load_json(path: str, encoding: str = "utf-8-sig") -> Any:
    """Return the content of a JSON file. Raises ValueError."""
    with _opened(path, encoding) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path!r} is not JSON: {error}.") from error


def json_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a list, or the (name, value) pairs of an object."""
    data = load_json(path)
    if isinstance(data, dict):
        yield from ((f"{path}: {name}", (name, value)) for name, value in data.items())
    elif isinstance(data, list):
        yield from ((f"{path} element {number}", row) for number, row in enumerate(data))
    else:
        raise ValueError(f"{path!r} holds {type(data).__name__}; a list or an object is wanted.")


def jsonl_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield one object a line."""
    for where, line in text_rows(path):
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, Dropped("", where, "annotation_broken", f"not JSON: {error}")


def csv_rows(
    path: str,
    *,
    delimiter: str = ",",
    columns: Sequence[str] = (),
    header: Sequence[str] | None = None,
    quoted: bool = True,
    encoding: str = "utf-8-sig",
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the lines of a table as {column: text}.

    Args:
        path: of the file.
        delimiter: between fields.
        columns: that must be there, else ValueError.
        header: names of the columns where the file has none.
        quoted: False where a quotation mark is a letter like any other.
        encoding: of the file.
    """
    before = csv.field_size_limit(_MAX_FIELD)  # of the whole process
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    with _opened(path, encoding) as file:
        try:
            reader = csv.DictReader(file, fieldnames=header, delimiter=delimiter, quoting=quoting)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                found = ", ".join(map(repr, list(reader.fieldnames or [])[:20])) or "nothing"
                raise ValueError(f"{path!r} has no column {', '.join(missing)}; its first line holds {found}.")
            for row in reader:
                cut = {name: value for name, value in row.items() if isinstance(name, str) and isinstance(value, str)}
                yield f"{path} line {reader.line_num}", cut
        except csv.Error as error:
            raise ValueError(f"{path!r} is not a table: {error}.") from error
        finally:
            csv.field_size_limit(before)


def text_rows(path: str) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, without what surrounds them."""
    with _opened(path, "utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", line.strip()


def _opened(path: str, encoding: str) -> TextIO:
    try:
        # What is not in the encoding comes through as half surrogates: it costs its own row only.
        return open(path, encoding=encoding, errors="surrogateescape", newline="")
    except OSError as error:
        raise ValueError(f"{path!r}: {error.strerror}; give the annotation file of this corpus.") from error
    except LookupError as error:
        raise ValueError(f"encoding {encoding!r} is unknown; utf-8 and cp1252 are common.") from error


def named_splits(paths: Sequence[str], splits: Sequence[str], *, one_a_file: bool) -> list[tuple[str, str]]:
    """Return (path, split) of each argument: SPLIT=FILE as it says, FILE by the words of its name.

    With `one_a_file` False, the rows of a file tell their own split and "" is returned for files.

    Raises:
        ValueError: no split is named, or one that the corpus does not have.
    """
    found = []
    for argument in paths:
        split, equals, path = argument.partition("=")
        if equals and split in splits:
            found.append((path, split))
        elif equals and re.fullmatch(r"\w+", split) and not os.path.exists(argument):
            raise ValueError(f"{argument!r}: no split {split!r}; there are {', '.join(splits)}.")
        else:
            found.append((argument, _split_of(argument, splits) if one_a_file else ""))
    return found


def _split_of(path: str, splits: Sequence[str]) -> str:
    words = re.split(r"[^a-z0-9]+", os.path.splitext(os.path.basename(path))[0].lower())
    name = "_".join(["", *(_WORDS.get(word, word) for word in words), ""])
    found = [split for split in sorted(splits, key=len, reverse=True) if f"_{split}_" in name]  # val_1 before val
    if found or len(splits) == 1:
        return (found or list(splits))[0]
    raise ValueError(f"{path!r} does not tell its split; write SPLIT={path} with one of {', '.join(splits)}.")
