"""One safetensors file: written in one pass with its digests, read through a memory map, its header never trusted.

A digest is a list of sha256, one for each `CHUNK` bytes, so that threads and ranks can share the check of one file.
"""

import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 25  # bytes of a digest
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_TENSORS = 1_000_000
_MAX_DIMS = 64
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class Place(NamedTuple):
    """Where a tensor lies in a file; `start` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a new file, force it to the disk, and return its manifest entry {size, sha256}.

    Raises:
        OSError: the disk refused, or the file is there already.
        ValueError: a tensor of a type that the format does not know.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    return write_bytes(path, itertools.chain([_header(tensors, order)], (_bytes_of(tensors[name]) for name in order)))


def write_bytes(path: Path, parts: Iterable[Any]) -> dict[str, Any]:
    """Write byte strings to a new file, force it to the disk, and return its manifest entry."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    hashes, size = [hashlib.sha256()], 0
    with open(os.open(path, flags, 0o640), "wb", buffering=0) as file:
        for part in parts:
            for piece in _pieces(memoryview(part), size):
                if size and size % CHUNK == 0:
                    hashes.append(hashlib.sha256())
                hashes[-1].update(piece)
                size += len(piece)
                while len(piece):  # a write may take a part only
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return {"size": size, "sha256": [each.hexdigest() for each in hashes]}


class Mapped:
    """A file in memory by name, read only where it is touched; tensors are private copies on write.

    Raises:
        OSError: it cannot be opened, or is a link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.bytes = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY) if self.size else bytearray()

    def differs(self, entry: Mapping[str, Any], chunks: Iterable[int]) -> bool:
        """Compare some chunks with a manifest entry."""
        digests, view = entry["sha256"], memoryview(self.bytes)
        if self.size != entry["size"] or len(digests) != num_chunks(self.size):
            return True

        def wrong(number: int) -> bool:
            return hashlib.sha256(view[number * CHUNK : (number + 1) * CHUNK]).hexdigest() != digests[number]

        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:  # hashing lets other threads run
            return any(list(pool.map(wrong, chunks)))

    def places(self) -> dict[str, Place]:
        """Read the header.

        Raises:
            ValueError: it is not what a safetensors header must be.
        """
        try:
            return dict(_places(self.bytes, self.size))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path.name}: {error}") from None

    def tensor(self, place: Place) -> Tensor:
        """Return a tensor that shares memory with the file's pages until it is written to."""
        if not place.num_bytes:
            return torch.empty(place.shape, dtype=place.dtype)
        count = math.prod(place.shape)
        flat = torch.frombuffer(self.bytes, dtype=place.dtype, count=count, offset=place.start)
        return flat.reshape(place.shape)


def num_chunks(size: int) -> int:
    """Return the number of digests of a file of `size` bytes; an empty one has one."""
    return max(1, -(-size // CHUNK))


def _header(tensors: Mapping[str, Tensor], order: Iterable[str]) -> bytes:
    start, entries = 0, {}
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor '{name}' has type {tensor.dtype}, which safetensors cannot hold; convert it.")
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, from the device if need be, one tensor at a time."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pieces(view: memoryview, size: int) -> Iterator[memoryview]:
    """Cut bytes that begin at offset `size` of a file where its chunks end."""
    while len(view):
        room = CHUNK - size % CHUNK
        yield view[:room]
        size += len(view[:room])
        view = view[room:]


def _places(data: Any, size: int) -> Iterator[tuple[str, Place]]:
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header is said to be {length} bytes long in a file of {size}")
    header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_unique)
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise ValueError("its header is no table of tensors")
    header.pop("__metadata__", None)
    start, end = 8 + length, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        place = _place(name, entry, start)
        if _offsets(name, entry)[0] != end:
            raise ValueError(f"tensor '{name}' overlaps another, or leaves a gap before it")
        end += place.num_bytes
        yield name, place
    if start + end != size:
        raise ValueError(f"its tensors end at byte {start + end} of {size}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return table


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise ValueError(f"tensor '{name}' has no valid place")


def _place(name: str, entry: Mapping[str, Any], start: int) -> Place:
    begin, end = _offsets(name, entry)
    match entry:
        case {"dtype": str(word), "shape": [*shape]} if word in _TYPES and len(shape) <= _MAX_DIMS:
            if not all(type(n) is int and 0 <= n < 2**63 for n in shape):
                raise ValueError(f"tensor '{name}' has no valid shape")
            if math.prod(shape) * _TYPES[word].itemsize != end - begin:  # Python's integers do not overflow
                raise ValueError(f"tensor '{name}' of shape {shape} does not fill its {end - begin} bytes")
            return Place(_TYPES[word], tuple(shape), start + begin, end - begin)
    raise ValueError(f"tensor '{name}' has no known type or no valid shape")
