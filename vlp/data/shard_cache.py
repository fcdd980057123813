"""Whole remote shards on a local disk, bounded in bytes, shared by all processes and runs that name the same folder.

    DIR/NAME.tar     a whole shard, compared with its digest before it got this name
    DIR/NAME.part    one that is being fetched: locked by its process, and from the first as large as it will be
    DIR/lock         held while room is made

Nobody waits for a fetch: what is not there yet is read by range. Locks are flocks, which end with their process, and a
.part that nobody has locked belongs to a killed one and is removed. Shards that are wanted are held by a shared lock;
the others leave, least recently used first.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import IO, Any, NamedTuple

from vlp.data import storage
from vlp.data.index import ShardIndex
from vlp.data.remote import is_remote, shown

CHUNK = 16 << 20  # bytes of one range of a fetch

_AGAIN_S = 5.0  # after which shards that could not be fetched, for want of room or because another did, are tried again
_log = logging.getLogger(__name__)


class _File(NamedTuple):
    used_ns: int  # when it was read last
    size: int
    path: str


class ShardCache:
    """A folder of shards. Can be pickled, and used after a fork.

    Args:
        directory: on a local disk, made if it is missing; other caches may use it too, with their own limit.
        max_bytes: of all shards in it, whole or on their way. One that is larger than that is never fetched.

    Raises:
        ValueError: the folder cannot be written, or the limit is not positive.
    """

    def __init__(self, directory: str, *, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"the shard cache may hold {max_bytes} bytes; data.cache_gib must be above 0.")
        try:
            os.makedirs(directory, exist_ok=True)
            with storage.locked(os.path.join(directory, "lock")):
                pass
        except OSError as error:
            raise ValueError(
                f"the shard cache {directory!r} cannot be written: {error.strerror}; set data.cache_dir."
            ) from error
        self.directory, self.max_bytes = directory, max_bytes
        self._warned = False
        self._fetcher: tuple[int, Fetcher] | None = None  # and the process whose thread it is

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetcher": None}

    def read(self, index: ShardIndex, offset: int, size: int) -> bytes | None:
        """Return bytes of a shard, None if it is not there; never waits."""
        try:
            with open(self.path(index), "rb", buffering=0) as file:
                os.utime(file.fileno())
                whole = os.fstat(file.fileno()).st_size == index.info.size
                data = os.pread(file.fileno(), size, offset) if whole else b""
        except OSError:
            return None
        if not whole:
            self.drop(index)
        return data if len(data) == size else None  # one pread returns at most 2 GiB; more than that by range

    def drop(self, index: ShardIndex) -> None:
        """Remove a shard whose bytes are wrong."""
        _log.warning("%s: its copy in the cache is damaged and is removed", shown(index.shard))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(index))

    def fetch(self, index: ShardIndex) -> bool:
        """Fetch a shard unless it is there; return False if another process is at it, or if there is no room.

        Raises:
            StorageError: it cannot be read, or is not the one that was indexed. OSError: the disk refuses it.
        """
        path = self.path(index)
        if os.path.exists(path):
            return True
        part = self._reserve(index)
        if part is None:
            return False
        with part:  # locked until it is closed
            try:
                digest = _copy(index, part)
                if not index.info.headers_only and digest != index.info.sha256:
                    raise storage.StorageError(f"{shown(index.shard)}: its bytes are not those that were indexed")
                os.replace(part.name, path)
            except BaseException:
                os.unlink(part.name)
                raise
        return True

    def ahead(self, owner: str, indexes: Sequence[ShardIndex]) -> None:
        """Fetch shards in the background, in this order, and hold them; they replace what `owner` wanted before."""
        if self._fetcher is None or self._fetcher[0] != os.getpid():  # a thread does not survive a fork
            self._fetcher = (os.getpid(), Fetcher(self))
        self._fetcher[1].want(owner, [index for index in indexes if is_remote(index.shard)])

    def close(self) -> None:
        """End the thread of this process, if there is one, and let go of what it holds."""
        if self._fetcher and self._fetcher[0] == os.getpid():
            self._fetcher[1].close()
        self._fetcher = None

    def path(self, index: ShardIndex) -> str:
        """Return where a shard lies or would lie: by content, or by URL where its digest is not known."""
        info = index.info
        identity = f"{info.sha256} {info.size} {shown(index.shard) if info.headers_only else ''}"
        return os.path.join(self.directory, hashlib.sha256(identity.encode()).hexdigest()[:32] + ".tar")

    def _reserve(self, index: ShardIndex) -> IO[bytes] | None:
        """Lock the temporary file of a shard and make room; None without room, or while another process has it."""
        name = self.path(index).removesuffix("tar") + "part"
        with storage.locked(os.path.join(self.directory, "lock")):
            open(name, "ab").close()
            part = _locked(name)
            if part is None:
                return None
            if self._make_room(index.info.size):
                part.truncate(index.info.size)  # counted by others before its bytes come
                return part
            os.unlink(name)
            part.close()
        self._warn(index)
        return None

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what killed processes left, then as few old shards as make room; none if that is not enough."""
        if num_bytes > self.max_bytes:
            return False
        for each in _named(self.directory, ".part"):
            if (part := _locked(each.path)) is not None:
                os.unlink(each.path)
                part.close()
        whole = sorted(_named(self.directory, ".tar"))
        used = num_bytes + sum(each.size for each in (*whole, *_named(self.directory, ".part")))
        with ExitStack() as stack:
            victims = []
            for each in whole:
                if used <= self.max_bytes:
                    break
                if (file := _locked(each.path)) is not None:  # else somebody wants it
                    victims.append(stack.enter_context(file).name)
                    used -= each.size
            for path in victims if used <= self.max_bytes else ():
                os.unlink(path)
        return used <= self.max_bytes

    def _warn(self, index: ShardIndex) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the shard cache of %.3f GiB has no room for %s (%.3f GiB) beside what is in use; such shards are read "
                "by range: raise data.cache_gib, or lower data.window_shards",
                *(self.max_bytes / 2**30, shown(index.shard), index.info.size / 2**30),
            )


class Fetcher:
    """A thread that fetches what is wanted, and locks that hold it while it is."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache, self._held = cache, dict[str, IO[bytes]]()
        self._wanted: dict[str, list[ShardIndex]] = {}  # by owner
        self._failed: set[str] = set()  # paths that this process does not try again
        self._news, self._changed, self._closed = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="shard-cache", daemon=True)
        self._thread.start()

    def want(self, owner: str, indexes: list[ShardIndex]) -> None:
        with self._news:
            self._wanted[owner] = indexes
            self._changed = True
            self._news.notify()

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        again_s = None
        while True:
            with self._news:
                if not (self._changed or self._closed):
                    self._news.wait(again_s)
                self._changed = False
                wanted = {self._cache.path(index): index for indexes in self._wanted.values() for index in indexes}
            self._let_go(() if self._closed else wanted)
            if self._closed:
                return
            missing = [path for path, index in wanted.items() if not self._closed and not self._take(path, index)]
            again_s = _AGAIN_S if set(missing) - self._failed else None

    def _take(self, path: str, index: ShardIndex) -> bool:
        """Fetch a shard, if there is something to fetch, and hold it; return whether it is held."""
        if path in self._held or path in self._failed or self._changed:
            return path in self._held
        try:
            if self._cache.fetch(index) and (file := _locked(path, fcntl.LOCK_SH)) is not None:
                self._held[path] = file
        except storage.OutageError as error:  # tried again: whoever needs the shard waits for storage too
            _log.info("a shard is not cached yet: %s", error)
        except (storage.StorageError, OSError) as error:
            self._failed.add(path)
            _log.warning("a shard is not cached and is read by range: %s", error)
        return path in self._held

    def _let_go(self, wanted: Iterable[str]) -> None:
        for path in self._held.keys() - set(wanted):
            self._held.pop(path).close()


def _copy(index: ShardIndex, part: IO[bytes]) -> str:
    """Write a shard into its temporary file; return its digest."""
    digest, at = hashlib.sha256(), 0
    while at < index.info.size:
        data = storage.read(index.shard, at, min(CHUNK, index.info.size - at))
        digest.update(data)
        view = memoryview(data)
        while view:
            written = os.pwrite(part.fileno(), view, at)
            view, at = view[written:], at + written
    return digest.hexdigest()


def _locked(path: str, how: int = fcntl.LOCK_EX) -> IO[bytes] | None:
    """Open and lock a file without waiting; None if another has it, or if it is gone or has lost its name since."""
    try:
        file = open(path, "r+b", buffering=0)  # noqa: SIM115, the lock lasts as long as it is open
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):
        file.close()
        return None
    file.close()
    return None


def _named(directory: str, suffix: str) -> list[_File]:
    """List the files of a folder, without those that vanish meanwhile."""
    found = []
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):
            if entry.name.endswith(suffix):
                found.append(_File(entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
    return found
