"""Two ways through a shard from front to back: every byte, hashed; or its headers only, by ranges of a remote object.

Both are what `vlp.data.tar.members` reads from. Small reads are served from one range that is read ahead.
"""

import hashlib
import zlib

from vlp.data import storage
from vlp.data.remote import is_remote

CHUNK = 4 << 20  # bytes read at once where only a checksum is wanted, and ahead of small reads of a remote shard
_HEADERS = 64 << 10  # read ahead around a header: caption, record and the next header often lie in it


class _Ahead:
    """Reads of one shard, of which a small one takes `ahead` bytes and keeps the rest for the next."""

    def __init__(self, shard: str, *, ahead: int) -> None:
        self._shard, self.size = shard, storage.size(shard)
        self._ahead, self._begin, self._kept = ahead, 0, memoryview(b"")

    def read(self, position: int, size: int) -> bytes:
        size = min(size, self.size - position)
        begin = position - self._begin
        if not 0 <= begin <= begin + size <= len(self._kept):
            wanted = min(max(size, self._ahead), self.size - position)
            self._begin, self._kept = position, memoryview(storage.read(self._shard, position, wanted))
            begin = 0
        return bytes(self._kept[begin : begin + size])


class HashedStream:
    """A shard read once from front to back; every byte that is passed goes into `sha256`."""

    def __init__(self, shard: str) -> None:
        self._bytes = _Ahead(shard, ahead=CHUNK if is_remote(shard) else 0)
        self.size, self.sha256, self.position = self._bytes.size, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self._bytes.read(self.position, size)
        self.sha256.update(data)
        self.position += len(data)
        return data

    def seek(self, offset: int) -> None:
        while self.position < min(offset, self.size):
            self.read(min(CHUNK, offset - self.position))

    def take(self, size: int, *, limit: int) -> tuple[bytes | None, int]:
        """Return the next `size` bytes, None if they are more than `limit`, and their crc32."""
        if size <= limit:
            data = self.read(size)
            return data, zlib.crc32(data)
        crc32 = 0
        for at in range(0, size, CHUNK):
            crc32 = zlib.crc32(self.read(min(CHUNK, size - at)), crc32)
        return None, crc32


class HeaderStream:
    """The headers of a shard; what is passed over is not read, and `sha256` is that of the bytes asked for."""

    def __init__(self, shard: str) -> None:
        self._bytes = _Ahead(shard, ahead=_HEADERS)
        self.size, self.sha256, self.position = self._bytes.size, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self._bytes.read(self.position, size)
        self.sha256.update(data)
        self.position += len(data)
        return data

    def seek(self, offset: int) -> None:
        self.position = min(offset, self.size)
