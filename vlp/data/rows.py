"""Gathers the members of a shard into one row a sample, with a status, and packs the rows into flat arrays.

A sample is all members with the same key: the name up to the first dot of its last part, as in WebDataset. The members
of a sample need not be neighbours. Bad samples keep their row, so that positions never shift.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vlp.data import meta
from vlp.data.columns import PARTS, RAGGED, SCHEMA, Part
from vlp.data.probe import Limits, ProbeError, VideoFacts, probe
from vlp.types import Reason

VIDEOS = ("mp4", "mkv", "webm", "avi", "mov")
STILLS = ("jpg", "jpeg", "png", "webp")
PART_OF = {**dict.fromkeys((*VIDEOS, *STILLS), "video"), "txt": "txt", "json": "json"}

_PLACE = ("part_offset", "part_size", "part_crc")  # the columns of a Part
_UNKNOWN = -1  # characters of a caption that has not been read
_NO_FRAMES = np.zeros(0, np.int64)
_FACTS = ("width", "height", "num_frames", "fps", "duration_s", "rotation", "start_s")


@dataclass(slots=True)
class _Row:
    key: str
    extensions: set[str] = field(default_factory=set)
    parts: dict[str, Part] = field(default_factory=dict)
    extension: str = ""  # of the video part
    facts: VideoFacts | None = None
    num_chars: dict[str, int] = field(default_factory=dict)  # of the longest caption of a part
    problems: dict[str, tuple[Reason, str]] = field(default_factory=dict)  # by part, or "row"


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into key and lower-case extension; either is "" where there is none."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem else ("", "")


class Rows:
    """The samples of one shard while its index is made."""

    def __init__(self, limits: Limits, known_facts: Mapping[str, VideoFacts]) -> None:
        self.limits, self.known_facts = limits, known_facts
        self.rows: list[_Row] = []
        self.num_ignored = 0  # members that are no part of a sample
        self.ignored_example = ""
        self._newest: dict[str, _Row] = {}  # by key

    def size_limit(self, part: str) -> int:
        """Return above how many bytes a part need not be read, because it is refused anyway."""
        return {"video": self.limits.max_bytes, "txt": meta.MAX_TEXT, "json": meta.MAX_JSON}[part]

    def ignore(self, name: str) -> None:
        self.ignored_example = self.ignored_example or name
        self.num_ignored += 1

    def add(self, name: str, place: Part, data: bytes | None) -> None:
        """Add a member and examine it; `data` is None where the member is larger than its limit."""
        row, part = self._place(name, place)
        if row and "row" not in row.problems:
            self._examine(row, part, data)

    def add_unread(self, name: str, place: Part) -> None:
        """Add a member of which the size alone is known; what it holds is found out when training reads it."""
        row, part = self._place(name, place)
        if row is None or "row" in row.problems:
            return
        if part != "video":
            row.num_chars[part] = _UNKNOWN if place.size else 0
        if place.size > self.size_limit(part) or (part == "video" and not place.size):
            self._examine(row, part, None if place.size else b"")

    def _place(self, name: str, place: Part) -> tuple[_Row | None, str]:
        """Return the row that a member belongs to, None if to none, and which part of it it is."""
        key, extension = split_name(name)
        part = PART_OF[extension]
        row = self._newest.get(key)
        thumbnail = False
        if row and part == "video" and row.extension and (row.extension in STILLS) != (extension in STILLS):
            thumbnail = True  # a picture beside its video
            self.ignore(name if extension in STILLS else f"{key}.{row.extension}")
            if extension in STILLS:
                return None, part
        if row is None or (part in row.parts and not thumbnail):
            row = self._start(key, name if row else "")
        row.extensions.add(extension)
        row.parts[part] = place
        row.problems.pop(part, None)
        if part == "video":
            row.extension, row.facts = extension, None
        return row, part

    def _start(self, key: str, duplicate: str) -> _Row:
        row = self._newest[key] = _Row(key)
        self.rows.append(row)
        if duplicate:
            row.problems["row"] = (Reason.DUPLICATE_KEY, f"{duplicate} comes a second time")
        return row

    def _examine(self, row: _Row, part: str, data: bytes | None) -> None:
        if data is None:
            reason = Reason.LIMIT_EXCEEDED if part == "video" else Reason.CAPTION_BROKEN
            detail = f"{part}: {row.parts[part].size} bytes; at most {self.size_limit(part)} are allowed"
            row.problems[part] = (reason, detail)
            return
        try:
            if part == "video":
                row.facts = self.known_facts.get(row.key) or probe(data, self.limits)
            elif part == "txt":
                row.num_chars[part] = len(meta.parse_caption(data))
            else:
                row.num_chars[part] = max(map(len, meta.parse_record(data)["captions"]), default=0)
        except (ProbeError, meta.MetaError) as error:
            row.problems[part] = (error.reason, error.detail)

    def cut(self, member: str, rule: str) -> None:
        """Mark the sample as lost of which the damage that ends the shard has, or may have, taken a part.

        Where the damage names no `member`, the last sample counts as whole if it has the parts of the one before.
        """
        if member:
            row = self._newest.get(split_name(member)[0])
        else:
            whole = len(self.rows) > 1 and self.rows[-1].extensions >= self.rows[-2].extensions
            row = self.rows[-1] if self.rows and not whole else None
        if row:
            row.problems["row"] = (Reason.VIDEO_TRUNCATED, f"the shard is damaged inside this sample: {rule}")

    def pack(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the columns of SCHEMA and RAGGED, and the words that `codec` and `extension` number."""
        rows = self.rows
        words = sorted({""} | {row.extension for row in rows} | {row.facts.codec for row in rows if row.facts})
        columns = {name: np.zeros((len(rows), *axes), dtype) for name, (dtype, axes) in SCHEMA.items()}
        columns["part_size"][:] = -1
        for i, row in enumerate(rows):
            columns["extension"][i] = words.index(row.extension)
            columns["num_caption_chars"][i] = row.num_chars.get("json") or row.num_chars.get("txt", 0)
            for part, place in row.parts.items():
                for column, value in zip(_PLACE, place, strict=True):
                    columns[column][i, PARTS.index(part)] = value
            if row.facts:
                columns["codec"][i] = words.index(row.facts.codec)
                for name in _FACTS:
                    columns[name][i] = getattr(row.facts, name)
        statuses = [_status(row) for row in rows]
        columns["status"][:] = [reason for reason, _ in statuses]
        columns |= _ragged("key", [np.frombuffer(row.key.encode(), np.uint8) for row in rows])
        columns |= _ragged("detail", [np.frombuffer(text.encode(errors="replace"), np.uint8) for _, text in statuses])
        columns |= _ragged("key_frames", [row.facts.key_frames if row.facts else _NO_FRAMES for row in rows])
        return columns, words


def _ragged(name: str, pieces: list[np.ndarray]) -> dict[str, np.ndarray]:
    values = np.concatenate(pieces).astype(RAGGED[name]) if pieces else np.zeros(0, RAGGED[name])
    return {f"{name}_values": values, f"{name}_ends": np.cumsum([len(piece) for piece in pieces], dtype=np.int64)}


def _status(row: _Row) -> tuple[Reason, str]:
    """Return the first thing that is wrong with a sample, in the order: itself, its video, its captions."""
    if "video" not in row.parts:
        found = ", ".join(sorted(row.extensions))
        row.problems.setdefault("video", (Reason.VIDEO_MISSING, f"the shard has only these of its parts: {found}"))
    if not any(row.num_chars.values()):
        row.problems.setdefault("none", (Reason.CAPTION_MISSING, "neither the txt nor the json part has a caption"))
    for part in ("row", "video", "json", "txt", "none"):
        if part in row.problems:
            return row.problems[part]
    return Reason.OK, ""
