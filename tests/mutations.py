"""Damage for shards and clips: every mutation takes bytes and a generator and returns bytes, seldom the same.

What it does follows from the generator alone, so that a seed and a number name a damaged file.
"""

import gzip
import io
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from itertools import pairwise

BLOCK = 512
Mutation = Callable[[bytes, random.Random], bytes]

PAGE = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>No.</body></html>\n"
PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/hostname\n"


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def one_flip(data: bytes, rng: random.Random) -> bytes:
    return _flipped(data, [rng.randrange(8 * len(data))])


def flips(data: bytes, rng: random.Random) -> bytes:
    return _flipped(data, [rng.randrange(8 * len(data)) for _ in range(rng.randint(2, 32))])


def zeroed(data: bytes, rng: random.Random) -> bytes:
    return _overwritten(data, rng, lambda size: bytes(size))


def noise(data: bytes, rng: random.Random) -> bytes:
    return _overwritten(data, rng, rng.randbytes)


def repeated(data: bytes, rng: random.Random) -> bytes:
    at, size = _range(data, rng)
    return data[: at + size] + data[at : at + size] + data[at + size :]


def removed(data: bytes, rng: random.Random) -> bytes:
    at, size = _range(data, rng)
    return data[:at] + data[at + size :]


def replaced(data: bytes, rng: random.Random) -> bytes:
    """Another file under the same name, sometimes of the same size."""
    whole = rng.choice(
        [b"", PAGE, gzip.compress(data), zlib.compress(data), rng.randbytes(len(data)), bytes(len(data))]
    )
    return (whole * (1 + len(data) // max(1, len(whole))))[: len(data)] if rng.random() < 0.5 else whole


# Shards.


def headers(data: bytes) -> list[int]:
    """Return where the headers of an archive lie, those of extended headers too."""
    found, at = [], 0
    while at + BLOCK <= len(data) and data[at : at + BLOCK].strip(b"\0"):
        found.append(at)
        at += BLOCK + -(-int(data[at + 124 : at + 135].strip(b"\0 ") or b"0", 8) // BLOCK) * BLOCK
    return found


def header_bit(data: bytes, rng: random.Random) -> bytes:
    return _flipped(data, [8 * rng.choice(headers(data)) + rng.randrange(8 * BLOCK)])


def header_bits(data: bytes, rng: random.Random) -> bytes:
    where = headers(data)
    return _flipped(data, [8 * rng.choice(where) + rng.randrange(8 * BLOCK) for _ in range(rng.randint(2, 6))])


def swapped_blocks(data: bytes, rng: random.Random) -> bytes:
    one, other = (rng.randrange(len(data) // BLOCK) * BLOCK for _ in range(2))
    patched = bytearray(data)
    patched[one : one + BLOCK], patched[other : other + BLOCK] = data[other : other + BLOCK], data[one : one + BLOCK]
    return bytes(patched)


def zeroed_blocks(data: bytes, rng: random.Random) -> bytes:
    at, num = rng.randrange(len(data) // BLOCK) * BLOCK, rng.randint(1, 4)
    return (data[:at] + bytes(num * BLOCK) + data[at + num * BLOCK :])[: len(data)]


def doubled_blocks(data: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.randrange(len(data) // BLOCK + 1) * BLOCK for _ in range(2))
    return data[:end] + data[at:end] + data[end:]


def lost_blocks(data: bytes, rng: random.Random) -> bytes:
    at, num = rng.randrange(len(data) // BLOCK) * BLOCK, rng.randint(1, 8)
    return data[:at] + data[at + num * BLOCK :]


def doubled_members(data: bytes, rng: random.Random) -> bytes:
    """Repeat, drop or swap whole members: every header is right, and the archive is wrong."""
    edges = [*headers(data), len(data)]
    one, other, num = rng.randrange(len(edges) - 1), rng.randrange(len(edges) - 1), rng.randint(1, 6)
    pieces = [data[low:high] for low, high in pairwise(edges)]
    kind = rng.randrange(3)
    if kind == 0:
        pieces[other:other] = pieces[one : one + num]
    elif kind == 1:
        del pieces[one : one + num]
    else:
        pieces[one], pieces[other] = pieces[other], pieces[one]
    return b"".join(pieces)


def wrong_size(data: bytes, rng: random.Random) -> bytes:
    """A size field that lies, in octal or base 256, its checksum right: members overlap, shrink or leave the file."""
    at = rng.choice(headers(data))
    size = int(data[at + 124 : at + 135].strip(b"\0 ") or b"0", 8)
    new = rng.choice([0, size + 1, max(0, size - 1), size + BLOCK, max(0, size - BLOCK), 2 * size, 8**10, len(data)])
    octal, big = b"%011o\0" % new, b"\x80" + rng.choice([new, 2**62, 2**80]).to_bytes(11)
    field = rng.choice([octal, octal, big, b"\xff" * 12, b"-0000000001\0", rng.randbytes(12)])
    return _with_field(data, at, 124, field)


def wrong_type(data: bytes, rng: random.Random) -> bytes:
    """A member that is sparse, a link, a device or an extended header by its type."""
    kind = rng.choice([b"S", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"M", b"V", b"A"])
    return _with_field(data, rng.choice(headers(data)), 156, kind)


def extended(data: bytes, rng: random.Random) -> bytes:
    """An extended header before a member: sparse, another size or path, too long, or nonsense."""
    records = [
        *({"GNU.sparse.realsize": "99999999"}, {"GNU.sparse.map": "0,512", "GNU.sparse.size": "4096"}),
        *({"size": str(rng.choice([0, 1, 600, 10**12]))}, {"path": "other.mp4"}, {"path": "../up.txt"}),
        *({"comment": "x" * rng.choice([3, 70_000])}, {"hdrcharset": "BINARY"}, {"path": "a\nb.txt"}),
    ]
    head = tarfile.TarInfo.create_pax_global_header(rng.choice(records))
    head = _with_field(head, 0, 156, rng.choice([b"x", b"x", b"g", b"L"]))
    at = rng.choice(headers(data))
    return data[:at] + head + data[at:]


SHARD_MUTATIONS: tuple[Mutation, ...] = (
    *(cut, one_flip, flips, zeroed, noise, repeated, removed, replaced, header_bit, header_bit, header_bits),
    *(swapped_blocks, zeroed_blocks, doubled_blocks, lost_blocks, doubled_members, wrong_size, wrong_type, extended),
)


# Clips.


def box_size(data: bytes, rng: random.Random) -> bytes:
    """Another size in the head of a box of an mp4."""
    kinds = [b"ftyp", b"moov", b"mdat", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"stts", b"stsz", b"stco", b"avcC"]
    where = [data.find(kind) for kind in [*kinds, b"elst", b"ctts", b"stss", b"stsc", b"mvhd", b"tkhd", b"mdhd"]]
    return _patched(data, [at - 4 for at in where if at >= 4], rng)


def table_entry(data: bytes, rng: random.Random) -> bytes:
    """Another number in one of the tables or headers of an mp4."""
    kinds = (b"stts", b"stsz", b"stco", b"ctts", b"stss", b"stsc", b"elst", b"mvhd", b"tkhd", b"mdhd", b"avc1", b"stsd")
    where = [data.find(kind) for kind in kinds]
    return _patched(data, [at + rng.randrange(4, 60) for at in where if at >= 0], rng)


def head_bytes(data: bytes, rng: random.Random) -> bytes:
    """Noise in the first 200 bytes, where every container has its header."""
    at = rng.randrange(min(200, len(data)))
    return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at + 8 :]


def tail_bytes(data: bytes, rng: random.Random) -> bytes:
    """Noise in the last 1,000 bytes, where most mp4 have theirs."""
    at = rng.randrange(max(0, len(data) - 1000), len(data))
    return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at + 8 :]


def no_video(data: bytes, rng: random.Random) -> bytes:
    """What is not a video at all, under the name of one."""
    archive = io.BytesIO()
    tarfile.open(fileobj=archive, mode="w").close()
    return rng.choice(
        [b"", PAGE, PLAYLIST, CONCAT, gzip.compress(data), archive.getvalue(), rng.randbytes(999), b"\0" * 99]
    )


def spliced(data: bytes, rng: random.Random) -> bytes:
    """The beginning of the file before another part of it."""
    return data[: rng.randrange(len(data))] + data[rng.randrange(len(data)) :]


CLIP_MUTATIONS: tuple[Mutation, ...] = (
    *(cut, one_flip, flips, zeroed, noise, repeated, removed, spliced, no_video, head_bytes, head_bytes),
    *(tail_bytes, tail_bytes, box_size, box_size, table_entry, table_entry, table_entry),
)


def mutated(data: bytes, mutations: tuple[Mutation, ...], rng: random.Random) -> tuple[str, bytes]:
    """Apply one mutation, seldom some flips after it; return its name and the bytes."""
    chosen = rng.choice(mutations)
    result = chosen(data, rng)
    if result and rng.random() < 0.1:
        return f"{chosen.__name__}+flips", flips(result, rng)
    return chosen.__name__, result


def _flipped(data: bytes, bits: list[int]) -> bytes:
    patched = bytearray(data)
    for bit in bits:
        patched[bit // 8] ^= 1 << bit % 8
    return bytes(patched)


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    return rng.randrange(len(data)), rng.choice([1, 7, 64, 512, 1000, 4096])


def _overwritten(data: bytes, rng: random.Random, make: Callable[[int], bytes]) -> bytes:
    at, size = _range(data, rng)
    return (data[:at] + make(size) + data[at + size :])[: len(data)]


def _patched(data: bytes, where: list[int], rng: random.Random) -> bytes:
    if not where:
        return flips(data, rng)
    at = rng.choice(where)
    numbers = [0, 1, 2, 7, 8, 9, 255, 65_536, 2**31 - 1, 2**31, 2**32 - 1, len(data), rng.getrandbits(32)]
    return data[:at] + struct.pack(">I", rng.choice(numbers)) + data[at + 4 :]


def _with_field(data: bytes, header: int, at: int, field: bytes) -> bytes:
    """Write a field of a tar header and repair the checksum."""
    block = bytearray(data[header : header + BLOCK])
    block[at : at + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + bytes(block) + data[header + BLOCK :]
