"""The file format of an index: flat arrays in safetensors, one JSON text of metadata, one checksum over both.

A file is mapped, not read: opening it costs one pass for its checksum, nothing is copied or kept per sample, and the
pages are shared by all processes of a node. That is why the arrays are not read with the library, which copies them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from vlp.types import Reason

VERSION = 1
PARTS = ("video", "txt", "json")

# Columns of the index, one entry a row: dtype and the axes after that of rows (3: one for each of PARTS).
SCHEMA: dict[str, tuple[str, tuple[int, ...]]] = {
    "part_offset": ("<i8", (3,)),
    "part_size": ("<i8", (3,)),  # -1: the sample has no such part
    "part_crc": ("<u4", (3,)),
    "num_frames": ("<i8", ()),
    "fps": ("<f8", ()),
    "duration_s": ("<f8", ()),
    "start_s": ("<f8", ()),
    "width": ("<i4", ()),  # 0: the video could not be probed, or has not been yet
    "height": ("<i4", ()),
    "rotation": ("<i2", ()),
    "num_caption_chars": ("<i4", ()),  # -1: not known yet
    "status": ("|u1", ()),
    "codec": ("|u1", ()),  # position in the words of the index
    "extension": ("|u1", ()),
}
# Columns of entries of any length: NAME_values, one after the other, and NAME_ends, where each ends.
RAGGED = {"key": "|u1", "detail": "|u1", "key_frames": "<i8"}

_MAX_HEADER = 1 << 20
_DTYPES = {"U8": "|u1", "U32": "<u4", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}  # names of safetensors


class Part(NamedTuple):
    """Where a part of a sample lies in its shard."""

    offset: int
    size: int
    crc32: int


class IndexFileError(ValueError):
    """An index is missing, damaged or not that of its shard; the message names the file, the rule and the remedy."""


class Info(NamedTuple):
    """What an index says of its shard as a whole."""

    shard: str  # file name
    size: int
    sha256: str  # of its bytes; with headers_only of its tar headers
    count: int
    damage: str  # the first broken rule of a shard indexed with on_damage="keep", else ""
    num_ignored: int  # members that are no part of a sample
    ignored_example: str  # the name of the first of them
    words: tuple[str, ...]  # what the columns codec and extension number
    headers_only: bool = False  # no part has been read: no checksums, no facts of videos, and OK means "seems to be"


def dump(info: Info, columns: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of an index file."""
    meta = info._asdict() | {"version": VERSION}
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    meta["digest"] = _digest(meta, columns)
    return save(columns, metadata={"index": json.dumps(meta)})


def parse(data: memoryview) -> tuple[Info, dict[str, np.ndarray]]:
    """Return what `dump` was given; the arrays are views of `data`.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: the file is not an index, or damaged, or contradicts itself.
    """
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER, len(data) - 8):
        raise ValueError("not an index: its header is longer than the file or than is allowed")
    header = json.loads(bytes(data[8 : 8 + size]))
    meta = json.loads(header.pop("__metadata__")["index"])
    if meta["version"] != VERSION:
        raise ValueError(f"version {meta['version']} of the index; this program reads version {VERSION}")
    columns = {name: _column(data[8 + size :], entry) for name, entry in header.items()}
    digest = meta.pop("digest")
    if digest != _digest(meta, columns):
        raise ValueError("damaged: its bytes differ from its checksum")
    del meta["version"]
    info = Info(**meta | {"words": tuple(meta["words"])})
    _check_shapes(info, columns)
    _check_values(info, columns)
    return info, columns


def _column(data: memoryview, entry: dict[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= len(data):
        raise ValueError("damaged: a column lies outside the file")
    return np.frombuffer(data[start:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _digest(meta: dict[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(columns):
        column = columns[name]
        digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
        digest.update(column.data)
    return digest.hexdigest()


def _check_shapes(info: Info, columns: Mapping[str, np.ndarray]) -> None:
    """Check what a checksum cannot, because whoever can write a file can write its checksum too."""
    shapes = {name: (dtype, (info.count, *axes)) for name, (dtype, axes) in SCHEMA.items()}
    for name, dtype in RAGGED.items():
        shapes[f"{name}_ends"] = ("<i8", (info.count,))
        shapes[f"{name}_values"] = (dtype, (columns[f"{name}_values"].size,))
    if shapes != {name: (column.dtype.str, column.shape) for name, column in columns.items()}:
        raise ValueError("columns are missing, unknown or of another type or length")


def _check_values(info: Info, columns: Mapping[str, np.ndarray]) -> None:
    """Check that nothing points outside the shard or outside its own table."""
    for name in RAGGED:
        ends = columns[f"{name}_ends"]
        if (np.diff(ends, prepend=0) < 0).any() or len(columns[f"{name}_values"]) != (ends[-1] if len(ends) else 0):
            raise ValueError(f"the ends of column {name} are not in order")
    there = columns["part_size"] >= 0
    offset, size = columns["part_offset"][there], columns["part_size"][there]
    if (offset < 0).any() or (size > info.size).any() or (offset > info.size - size).any():
        raise ValueError("a part lies outside the shard")
    if not np.isin(columns["status"], list(Reason)).all():
        raise ValueError("an unknown status")
    if max(columns["codec"].max(initial=0), columns["extension"].max(initial=0)) >= max(1, len(info.words)):
        raise ValueError("a codec or extension without a word")
