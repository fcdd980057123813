"""The folder of downloaded videos: which file an annotation means, and never one outside the folder."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from data_recipes.packed import lines
from vlp.data.caption_table import printable
from vlp.data.rows import STILLS, VIDEOS
from vlp.types import Reason

RENAMED = {"m4v": "mp4"}  # another name of what shards hold
TRANSCODED = ("gif", "ts")  # what shards do not hold: is encoded as mp4
EXTENSIONS = (*VIDEOS, *STILLS, *RENAMED, *TRANSCODED)


class File(NamedTuple):
    """A file below the folder; size and time tell whether it is still the one that a shard was made of."""

    path: str
    size: int
    time_ns: int
    offset: int = -1  # of a line of frames, see `data_recipes.packed`; -1: the file as a whole


class Refused(NamedTuple):
    """Why a name stands for no file."""

    reason: str
    detail: str


class Videos:
    """All videos and pictures below a folder, found once; hidden ones are passed over, linked folders not entered.

    Raises:
        ValueError: there is no such folder, or nothing to use in it.
    """

    def __init__(self, folder: str, *, texts: bool = False, packed: bool = False) -> None:
        """Search a folder; with `texts`, the .txt files too, which may hold captions; with `packed`, lines of .tsv."""
        if not os.path.isdir(folder):
            raise ValueError(f"--videos {folder!r} is not a folder; give the one that holds the downloaded files.")
        extensions = ("tsv",) if packed else EXTENSIONS + ("txt",) * texts
        self.folder, self.files = folder, {file.path: file for file in _scan(folder, extensions)}
        if not self.files:
            raise ValueError(f"--videos {folder!r} holds no file that ends in one of: {', '.join(extensions)}.")
        self._by_place: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        if packed:
            self.files = dict(_lines(folder, list(self.files.values())))
            return
        for path in sorted(self.files):
            self._by_place.setdefault(_stem(path), []).append(path)
            self._by_stem.setdefault(_stem(os.path.basename(path)), []).append(path)

    def find(self, name: str) -> File | Refused:
        """Return the file of this name: by path, by path without extension, or by its last part in any folder.

        Where a picture and a video have the same name, the picture is a thumbnail. Names are compared with the files
        that were found below the folder and never opened themselves.
        """
        if "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
            return Refused("path_refused", f"{printable(name)!r} would leave the folder of videos")
        if name in self.files:
            return self.files[name]
        groups = (self._by_place.get(_stem(name)), self._by_stem.get(_stem(name.rpartition("/")[2])))
        found = next((group for group in groups if group), [])
        found = [path for path in found if not path.lower().endswith(STILLS)] or found
        if len(found) == 1:
            return self.files[found[0]]
        several = f"{len(found)} files have the name {name!r}: {', '.join(found[:3])}"
        return Refused(Reason.VIDEO_MISSING.name.lower(), printable(several if found else f"no file {name!r}"))


def kind_of(file: File) -> str:
    """Return the extension of what is read of a file."""
    return extension_of(file.path) if file.offset < 0 else "mp4"


def extension_of(path: str) -> str:
    """Return the extension in lower case, without the dot."""
    return os.path.splitext(path)[1][1:].lower()


def _stem(path: str) -> str:
    # Only known extensions: names of clips hold dots too, such as 00.00.51.926.
    return os.path.splitext(path)[0] if extension_of(path) in EXTENSIONS else path


def _lines(folder: str, files: list[File]) -> Iterator[tuple[str, File]]:
    for file in files:
        for name, offset, size in lines(os.path.join(folder, file.path)):
            yield name, file._replace(size=size, offset=offset)


def _scan(folder: str, extensions: tuple[str, ...]) -> Iterator[File]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(place, name)
            if not name.startswith(".") and extension_of(name) in extensions and os.path.isfile(path):
                status = os.stat(path)
                yield File(os.path.relpath(path, folder), status.st_size, status.st_mtime_ns)
