"""Reads the captions of a folder of videos: one .csv or .jsonl for all, or a .txt beside each video.

A file that cannot be a table of captions is the user's mistake and raises ValueError. A line that is broken is lost, is
reported with its place, and costs nothing else.
"""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vlp.data.meta import MAX_JSON, MetaError, check_record, parse_caption, parse_meta
from vlp.data.probe import VideoFacts
from vlp.data.rows import VIDEOS
from vlp.types import Reason

VIDEO_COLUMNS = ("video", "key", "file", "path", "name", "id")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence")
TYPES = (".csv", ".jsonl")

_MAX_KEY = 200  # characters; a name in a shard has at most 1,024 bytes


class Lost(NamedTuple):
    """Something that never became a sample."""

    key: str  # of the sample, or the name by which a caption calls its video
    where: str  # file, and line if it has lines
    reason: Reason
    detail: str


class Clip(NamedTuple):
    """A video that has captions."""

    key: str
    path: str  # below the folder
    meta: dict[str, Any]
    facts: VideoFacts | None = None


class Entry(NamedTuple):
    """One line of a table."""

    video: str
    where: str
    meta: dict[str, Any]  # with "captions"


def match(folder: str, paths: list[str], captions: str | None) -> tuple[list[Clip], list[Lost]]:
    """Return the videos that have captions, in the order of `paths`, and what is lost: captions, lines and videos.

    Args:
        folder: of the videos.
        paths: of the files below it, videos and .txt.
        captions: the table; None: the .txt files.

    Raises:
        ValueError: as `read_table`.
    """
    texts = [path for path in paths if is_text(path)]
    videos = [path for path in paths if not is_text(path)]
    keys = _keys(videos)
    if captions is None:
        metas, lost = _from_texts(folder, videos, texts)
    else:
        metas, lost = _from_table(videos, captions)
    clips = []
    for path in videos:
        try:
            if path not in metas:
                raise MetaError(Reason.CAPTION_MISSING, "no caption names this video")
            # As it will be read: all captions of a video together may be too long.
            meta = parse_meta(None, json.dumps(metas[path], ensure_ascii=False).encode())
            clips.append(Clip(keys[path], path, meta))
        except MetaError as error:
            lost.append(Lost(keys[path], printable(path), error.reason, error.detail))
    return clips, lost


def is_text(path: str) -> bool:
    return path.lower().endswith(".txt")


def _keys(paths: list[str]) -> dict[str, str]:
    """Return a key for each path: itself without extension and without what a key may not hold, made unique."""
    keys: dict[str, str] = {}
    taken = Counter(_plain(path) for path in paths)
    for path in paths:
        plain = _plain(path)
        unique = taken[plain] == 1 and len(plain) <= _MAX_KEY
        keys[path] = plain if unique else f"{plain[:_MAX_KEY]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    return keys


def _plain(path: str) -> str:
    folder, _, base = os.path.splitext(path)[0].rpartition("/")
    words = [re.sub(r"[^\w\- ]", "_", part) for part in (*folder.split("/"), base) if part]
    return "/".join(words)


def _from_texts(folder: str, videos: list[str], texts: list[str]) -> tuple[dict[str, dict[str, Any]], list[Lost]]:
    named = _by_name(videos, lambda path: os.path.splitext(path)[0])
    metas: dict[str, dict[str, Any]] = {}
    lost = []
    for path in texts:
        stem = os.path.splitext(path)[0]
        try:
            captions = read_text(os.path.join(folder, path))
        except MetaError as error:
            lost.append(Lost(printable(stem), printable(path), error.reason, error.detail))
            continue
        except OSError as error:
            lost.append(Lost(printable(stem), printable(path), Reason.READ_FAILED, error.strerror or str(error)))
            continue
        if stem not in named:
            lost.append(Lost(printable(stem), printable(path), Reason.VIDEO_MISSING, "no video has this name"))
        elif captions:
            metas |= {video: {"captions": list(captions)} for video in named[stem]}
    return metas, lost


def _from_table(videos: list[str], captions: str) -> tuple[dict[str, dict[str, Any]], list[Lost]]:
    entries, lost = read_table(captions)
    by_path = _by_name(videos, str)
    by_place = _by_name(videos, lambda path: os.path.splitext(path)[0])
    by_file = _by_name(videos, os.path.basename)
    by_stem = _by_name(videos, lambda path: os.path.splitext(os.path.basename(path))[0])
    metas: dict[str, dict[str, Any]] = {}
    for entry in entries:
        # A bare name may stand for a video in any folder; one with folders may begin above the folder of videos.
        parts = entry.video.replace("\\", "/").split("/")
        tails = ["/".join(parts[at:]) for at in range(len(parts))]
        tables = (by_path, by_place) if len(parts) > 1 else (by_path, by_file, by_stem)
        found = next((table[tail] for tail in tails for table in tables if tail in table), [])
        if len(found) == 1:
            _merge(metas.setdefault(found[0], {}), entry.meta)
            continue
        several = f"{len(found)} videos have this name: {', '.join(found[:3])}; use the path"
        detail = several if found else "no such video"
        lost.append(Lost(printable(entry.video), entry.where, Reason.VIDEO_MISSING, printable(detail)))
    return metas, lost


def _by_name(paths: list[str], name: Callable[[str], str]) -> dict[str, list[str]]:
    """Return the paths by a name; where a picture and a video share it, the picture is a thumbnail and left out."""
    named: dict[str, list[str]] = {}
    for path in paths:
        named.setdefault(name(path), []).append(path)
    for key, group in named.items():
        named[key] = [path for path in group if path.lower().endswith(VIDEOS)] or group
    return named


def _merge(meta: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, list):
            known = meta.setdefault(name, [])
            known += [item for item in value if item not in known]
        else:
            meta.setdefault(name, value)


def read_table(path: str) -> tuple[list[Entry], list[Lost]]:
    """Return the lines of a caption file in order, and those that are broken.

    Raises:
        ValueError: neither .csv nor .jsonl, not readable, without a column that names the video or one that holds the
            caption, or without a usable line.
    """
    reader = _csv_lines if check_type(path) == ".csv" else _json_lines
    entries: list[Entry] = []
    lost: list[Lost] = []
    try:
        # Bytes that are not UTF-8 come through as half surrogates, so that they cost their own line only.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in reader(file):
                where = f"{path} line {number}"
                try:
                    entries.append(_entry(line, where))
                except MetaError as error:
                    name = _find(line, VIDEO_COLUMNS)[1] if isinstance(line, dict) else None
                    lost.append(Lost(printable(name or ""), where, error.reason, error.detail))
    except OSError as error:
        raise ValueError(f"captions={path!r}: {error.strerror}; give a .csv or .jsonl file.") from error
    except csv.Error as error:
        raise ValueError(f"captions={path!r}: {error}; the file is not CSV.") from error
    if not entries:
        first = f"; the first: {lost[0].where}: {lost[0].detail}" if lost else ""
        raise ValueError(f"captions={path!r}: none of its {len(lost)} lines is usable{first}.")
    return entries, lost


def check_type(path: str) -> str:
    """Return the type of a caption file, ".csv" or ".jsonl"; raises ValueError for any other."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in TYPES:
        allowed = " and ".join(TYPES)
        raise ValueError(f"captions={path!r}: unknown type; allowed are {allowed}; or None for .txt beside the videos.")
    return kind


def read_text(path: str) -> list[str]:
    """Return the captions of a .txt file, one a line, blank lines left out.

    Raises:
        MetaError: CAPTION_BROKEN.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise MetaError(Reason.CAPTION_BROKEN, f"txt: at most {MAX_JSON} bytes are allowed")
    captions = [parse_caption(line) for line in data.splitlines()]
    return [caption for caption in captions if caption]


def _csv_lines(file: Any) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(file)
    columns = [(name or "").strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    _check_columns(file.name, columns)
    for line in reader:
        yield reader.line_num, {name: value for name, value in line.items() if isinstance(value, str)}


def _json_lines(file: Any) -> Iterator[tuple[int, object]]:
    checked = False
    for number, text in enumerate(_bounded_lines(file), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text, parse_constant=lambda name: None) if len(text) <= MAX_JSON else None
        except (ValueError, RecursionError) as error:
            line = str(error)
        if isinstance(line, dict) and not checked:
            _check_columns(file.name, list(line))
            checked = True
        yield number, line


def _bounded_lines(file: Any) -> Iterator[str]:
    """Yield the lines of a file, of one that is longer than MAX_JSON only the beginning."""
    while line := file.readline(MAX_JSON + 1):
        rest = line
        while not rest.endswith("\n") and rest:
            rest = file.readline(MAX_JSON + 1)
        yield line


def _check_columns(path: str, columns: list[str]) -> None:
    lower = [column.lower() for column in columns]
    for allowed, what in ((VIDEO_COLUMNS, "names the video"), (CAPTION_COLUMNS, "holds the caption")):
        if not set(allowed).intersection(lower):
            found = ", ".join(printable(column[:40]) for column in columns[:20]) or "none"
            raise ValueError(f"captions={path!r}: no column {what}: found {found}; wanted one of {', '.join(allowed)}.")


def _entry(line: object, where: str) -> Entry:
    if not isinstance(line, dict):
        raise MetaError(Reason.CAPTION_BROKEN, f"not a JSON object of at most {MAX_JSON} bytes")
    name, video = _find(line, VIDEO_COLUMNS)
    if not isinstance(video, str | int) or isinstance(video, bool) or not str(video).strip():
        raise MetaError(Reason.CAPTION_BROKEN, f"no video is named under {name or ' or '.join(VIDEO_COLUMNS)}")
    name, caption = _find(line, CAPTION_COLUMNS)
    captions = caption if isinstance(caption, list) else [caption] if caption is not None else []
    others = {key: line[key] for key in ("hard_negative", "questions", "choices", "events") if key in line}
    meta = check_record(others | {"captions": captions})
    if not meta["captions"]:
        raise MetaError(Reason.CAPTION_MISSING, "the caption is empty")
    return Entry(str(video).strip(), where, meta)


def _find(line: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """Return the first of the columns that the line has, and its value; ("", None) if it has none."""
    lower = {key.lower(): value for key, value in line.items()}
    return next(((name, lower[name]) for name in names if lower.get(name) is not None), ("", None))


def printable(text: object) -> str:
    """Return a text that can be printed and stored: control characters and half surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
