"""What the first read of a sample found out, kept beside an index that was made of headers alone.

The index itself never changes: the order of the samples and the identity of the data are functions of it. Beside it
lies a text file to which whoever reads a part for the first time adds one line:

    crc32 of the rest of the line, row, part, crc32 of the part, facts of the video as JSON or null

Lines are added under a lock and only ever at the end. What a killed process left of a line fails its checksum and is
passed over; of two lines for one part the first counts.
"""

import fcntl
import json
import logging
import os
import zlib
from typing import NamedTuple

import numpy as np

from vlp.data.columns import PARTS
from vlp.data.probe import VideoFacts

log = logging.getLogger(__name__)

_MAX_KEY_FRAMES = 10_000  # a longer table is not kept: the video is probed each time


class Seen(NamedTuple):
    """What is known of a part."""

    crc32: int
    facts: VideoFacts | None  # of a video


class FirstReads:
    """The parts of one shard that have been read, by any process. Keeps where their lines are, not what they say."""

    def __init__(self, path: str, *, count: int) -> None:
        self._path, self._end, self._writable = path, 0, True
        self._places = np.full((count, len(PARTS), 2), -1, np.int64)  # offset and size of each line

    def knows(self, row: int, part: str) -> bool:
        """Return whether this process has come across the line of a part."""
        return bool(self._places[row, PARTS.index(part), 0] >= 0)

    def get(self, row: int, part: str) -> Seen | None:
        """Return what is known of a part, None if nobody has read it yet."""
        at = row, PARTS.index(part)
        if self._places[at][0] < 0:
            self._look_for_more()
        offset, size = map(int, self._places[at])
        return self._parsed(offset, size) if offset >= 0 else None

    def note(self, row: int, part: str, seen: Seen) -> None:
        """Add what was found out, unless somebody has; a folder that cannot be written costs one warning."""
        if not self._writable or self.get(row, part) is not None:
            return
        try:
            _append(self._path, f"{row} {part} {seen.crc32} {_dumped(seen.facts)}".encode())
        except OSError as error:
            self._writable = False
            log.warning("%s cannot be written: %s; videos are probed again", self._path, error.strerror or error)

    def _look_for_more(self) -> None:
        """Find the lines that were added since the last look."""
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size <= self._end:
                    return
                file.seek(self._end)
                lines = file.read().split(b"\n")
        except OSError:
            return
        for line in lines[:-1]:  # behind the last line break there may be half a line
            _, row, part, *_ = (line if _is_whole(line) else b"").split(b" ", 3) + [b""] * 3
            if row.isdigit() and int(row) < len(self._places) and part.decode() in PARTS:
                place = self._places[int(row), PARTS.index(part.decode())]
                if place[0] < 0:
                    place[:] = self._end, len(line)
            self._end += len(line) + 1

    def _parsed(self, offset: int, size: int) -> Seen | None:
        try:
            with open(self._path, "rb") as file:
                line = os.pread(file.fileno(), size, offset)
            if not _is_whole(line):
                return None
            _, _, _, crc32, facts = line.decode().split(" ", 4)
            return Seen(int(crc32), _loaded(facts))
        except (OSError, ValueError, TypeError, AttributeError):  # removed since, or written by something else
            return None


def seen_path(index_path: str) -> str:
    """Return where the first reads lie, beside an index."""
    return os.path.splitext(index_path)[0] + ".seen"


def _append(path: str, rest: bytes) -> None:
    """Add a line. A lock that a killed process held is free."""
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        torn = bool(end) and os.pread(file.fileno(), 1, end - 1) != b"\n"
        file.write(b"\n" * torn + b"%08x " % zlib.crc32(rest) + rest + b"\n")


def _is_whole(line: bytes) -> bool:
    return line[:8] == b"%08x" % zlib.crc32(line[9:])


def _dumped(facts: VideoFacts | None) -> str:
    if facts is None or len(facts.key_frames) > _MAX_KEY_FRAMES:
        return "null"
    return json.dumps(facts._asdict() | {"key_frames": facts.key_frames.tolist()})


def _loaded(text: str) -> VideoFacts | None:
    record = json.loads(text)
    if record is None:
        return None
    return VideoFacts(**record | {"key_frames": np.array(record["key_frames"], np.int64)})
