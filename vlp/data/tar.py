"""A strict reader of the headers of a tar archive: the subset that shards are made of, and a named rule for the rest.

Accepted are regular files and directories in ustar archives, pax headers that set `path` or `size`, and GNU long names.
Anything on which two tar readers could disagree is refused, because a shard must mean the same to everyone. No
allocation is larger than `MAX_EXTENDED`, whatever a header says; time is linear in the number of members.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
MAX_MEMBERS = 500_000
MAX_NAME = 1024  # bytes
MAX_EXTENDED = 64 * 1024  # bytes of one pax header

_ZEROS = bytes(BLOCK)
_OCTAL_LIMIT = 8**11  # sizes from here on do not fit into the octal field
_COMPRESSED = {
    **{b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"},
    **{b"\x04\x22\x4d\x18": "lz4", b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z"},
}
_REFUSED_TYPES = {
    **{b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device"},
    **{b"6": "a FIFO", b"7": "a contiguous file", b"S": "a GNU sparse file", b"K": "a GNU long link name"},
    **{b"M": "a continued file", b"V": "a volume label", b"D": "a GNU directory dump", b"N": "a GNU name table"},
}
# Records that change neither the name nor the bytes of a member. GNU.sparse.*, SCHILY.realsize and the like do.
_PAX_HARMLESS = re.compile(
    r"mtime|atime|ctime|uid|gid|uname|gname|comment"
    r"|SCHILY\.(dev|ino|nlink|fflags|xattr\..*|acl\..*)|LIBARCHIVE\.(creationtime|xattr\..*)|RHT\.security\..*",
    re.DOTALL,
)
# Control characters, line separators and bidirectional overrides: they forge lines and words of a log.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=\n]+)=")
_NUMBER = re.compile(rb" *([0-7]{1,12})[ \0]*")


class Stream(Protocol):
    """What is read: forward only, so that it may be a file, a pipe or a reader that hashes as it goes."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, /) -> object: ...


class Member(NamedTuple):
    """A regular file of an archive; `offset` and `size` are those of its data, in bytes."""

    name: str
    offset: int
    size: int


class TarError(ValueError):
    """The archive breaks a rule at byte `offset`; `member` names the file in it that is cut short, if known."""

    def __init__(self, file: str, offset: int, rule: str, member: str = "") -> None:
        super().__init__(file, offset, rule, member)
        self.file, self.offset, self.rule, self.member = file, offset, rule, member

    def __str__(self) -> str:
        return f"{self.file}: byte {self.offset}: {self.rule}"


class _Extended(NamedTuple):
    """What extended headers say about the next member."""

    path: str | None = None
    size: int | None = None


def members(file: Stream, *, size: int, name: str, max_members: int = MAX_MEMBERS) -> Iterator[Member]:
    """Yield the regular files of an archive in order, reading `file` forward only.

    Between two members the caller may read from `file` up to the end of the data of the last one.

    Args:
        file: positioned at its start; needs `read(size)` and `seek(offset)`.
        size: of the whole archive, in bytes.
        name: of the archive, for messages.
        max_members: headers of any kind after which the archive is refused.

    Raises:
        TarError: at the first byte where the archive is cut, damaged or outside the accepted subset. All members
            before it have been yielded.
    """
    offset, extended = 0, _Extended()
    for _ in range(max_members):
        member = None
        try:
            block = file.read(BLOCK)
            if offset == 0:
                _check_first_bytes(block)
            _check_length(block, BLOCK)
            if block == _ZEROS:
                _check_end(file, extended)
                return
            kind = _check_header(block, first=offset == 0)
            num_bytes = _number(block[124:136])
            if kind in b"xgL":
                extended = _extend(extended, kind, _read_extended(file, num_bytes))
            else:
                member = _member(block, kind, num_bytes, offset, extended)
                num_bytes, extended = member.size, _Extended()
                missing = member.offset + member.size - size
                if missing > 0:
                    raise ValueError(f"cut: {member.name!r} ends {missing} bytes after the archive")
        except ValueError as error:
            raise TarError(name, offset, str(error), member.name if member else "") from None
        if member and kind != b"5":
            yield member
        offset += BLOCK + -(-num_bytes // BLOCK) * BLOCK
        file.seek(offset)
    raise TarError(name, offset, f"more than {max_members} members")


def check_name(name: str) -> str:
    """Return the name of a member without a leading `./`.

    Raises:
        ValueError: the name is empty, absolute, too long, climbs with `..` or holds a control character.
    """
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    if not name or name == ".":
        raise ValueError("a member without a name")
    if len(name.encode(errors="surrogatepass")) > MAX_NAME:
        raise ValueError(f"a name longer than {MAX_NAME} bytes, starting with {name[:40]!r}")
    if _UNPRINTABLE.search(name):
        raise ValueError(f"a control character in the name {name!a}")
    if name.startswith("/"):
        raise ValueError(f"the absolute name {name!r}")
    if ".." in name.split("/"):
        raise ValueError(f"'..' in the name {name!r}")
    return name


def _check_length(data: bytes, size: int) -> None:
    if len(data) < size:
        raise ValueError(f"cut: {size} bytes wanted, {len(data)} left; the end mark of two zero blocks is missing")


def _check_end(file: Stream, extended: _Extended) -> None:
    """Check that a zero block is the end mark: a second one follows, and then nothing but zeros."""
    if extended != _Extended():
        raise ValueError("an extended header without a member")
    second = file.read(BLOCK)
    _check_length(second, BLOCK)
    if second != _ZEROS:
        raise ValueError("one zero block between members, where the end mark has two")
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise ValueError("data after the end mark; were two archives concatenated?")


def _check_header(block: bytes, *, first: bool) -> bytes:
    """Return the type of a header whose magic, checksum and type are accepted."""
    stored = _NUMBER.fullmatch(block[148:156])
    if not stored or int(stored[1], 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise ValueError("not a tar archive: the first header is wrong" if first else "the header checksum is wrong")
    if block[257:265] not in (b"ustar\x0000", b"ustar  \0"):
        raise ValueError(f"neither a ustar nor a GNU header: magic {block[257:265]!r}")
    kind = block[156:157]
    if kind not in (b"0", b"\0", b"5", b"x", b"g", b"L"):
        what = _REFUSED_TYPES.get(kind, f"the unknown type {kind!r}")
        raise ValueError(f"{what} is refused; only files and directories are read")
    return kind


def _check_first_bytes(block: bytes) -> None:
    if not block:
        raise ValueError("an empty file")
    for magic, kind in _COMPRESSED.items():
        if block.startswith(magic):
            raise ValueError(f"{kind} data; compressed archives are refused, unpack it to a plain .tar")
    if block.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError("a web page, not a tar archive; was the download refused?")


def _number(field: bytes) -> int:
    """Read an octal field, or GNU's base-256 form, in which only numbers below 2**63 are accepted."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:])
        if number < 2**63:
            return number
    match = _NUMBER.fullmatch(field)
    if not match:
        raise ValueError(f"the size {field!r} is negative, too large or not a number")
    return int(match[1], 8)


def _read_extended(file: Stream, size: int) -> bytes:
    if size > MAX_EXTENDED:
        raise ValueError(f"an extended header of {size} bytes; at most {MAX_EXTENDED} are allowed")
    payload = file.read(size)
    _check_length(payload, size)
    return payload


def _extend(extended: _Extended, kind: bytes, payload: bytes) -> _Extended:
    """Return `extended` with what one more extended header says."""
    if kind == b"g":
        if _pax_records(payload):
            raise ValueError("a global pax header sets path or size")
        return extended
    if extended != _Extended():
        raise ValueError("two extended headers before one member")
    if kind == b"L":
        if not payload.endswith(b"\0") or len(payload) > MAX_NAME + 1:
            raise ValueError(f"a GNU long name without its NUL, or longer than {MAX_NAME} bytes")
        return _Extended(path=_text(payload[:-1]))
    records = _pax_records(payload)
    size = records.get("size")
    if size is not None and not re.fullmatch(r"[0-9]{1,18}", size):
        raise ValueError(f"the pax size {size!r} is not a number")
    return _Extended(path=records.get("path"), size=int(size) if size is not None else None)


def _pax_records(payload: bytes) -> dict[str, str]:
    """Return `path` and `size` of a pax header; harmless records are skipped, any other is refused."""
    records, at = {}, 0
    while at < len(payload):
        match = _PAX_RECORD.match(payload, at)
        end = at + int(match[1]) if match else 0
        if not match or end <= match.end() or payload[end - 1 : end] != b"\n":
            raise ValueError("a pax record whose length is wrong")
        key = _text(match[2])
        if key in ("path", "size"):
            if key in records:
                raise ValueError(f"pax {key} is set twice")
            records[key] = _text(payload[match.end() : end - 1])
        elif not _PAX_HARMLESS.fullmatch(key):
            raise ValueError(f"the pax record {key!r} is refused: it may change the bytes of a member")
        at = end
    return records


def _member(block: bytes, kind: bytes, size: int, offset: int, extended: _Extended) -> Member:
    name = extended.path if extended.path is not None else _header_name(block)
    if kind != b"5" or name not in (".", "./"):  # `tar cf x.tar .` begins with the directory itself
        name = check_name(name)
    if extended.size is not None:
        # Where both sizes can be written they must agree, or readers that ignore pax see other members.
        if extended.size != size and extended.size < _OCTAL_LIMIT:
            raise ValueError(f"{name!r} has the size {size} in its header and {extended.size} in its pax header")
        size = extended.size
    if kind == b"5" and size:
        raise ValueError(f"the directory {name!r} has data")
    if kind != b"5" and name.endswith("/"):
        raise ValueError(f"the file {name!r} has the name of a directory")
    return Member(name, offset + BLOCK, size)


def _header_name(block: bytes) -> str:
    name = _text(block[:100].partition(b"\0")[0])
    if block[257:265] == b"ustar\x0000":  # GNU keeps times where ustar has the prefix
        prefix = _text(block[345:500].partition(b"\0")[0])
        return f"{prefix}/{name}" if prefix else name
    return name


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{raw[:60]!r} is not UTF-8") from None
