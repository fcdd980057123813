"""Where shards are: `read` and `size` by URL, and the URLs of a pattern. Every reader of shards goes through here.

Local files are read here, http(s):// and s3:// objects by `vlp.data.remote`; any other scheme is refused.
"""

import errno
import fcntl
import itertools
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import glob
from typing import BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from vlp.data import remote
from vlp.data.remote import RemoteError, UnansweredError, is_remote, shown

MAX_EXPANSION = 1_000_000  # URLs that one pattern may stand for
_MAX_OPEN = 256  # descriptors kept open in a process; far below the usual limit of 1,024
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")


# What a network file system says when its server is away. EIO is not among them: a bad sector says it too, for ever.
_NO_ANSWER = {
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNREFUSED, errno.ECONNRESET),
    *(errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO),
}


class StorageError(Exception):
    """Bytes could not be read; the message names the URL."""


class OutageError(StorageError):
    """Storage gave no answer, or none but "later"; it may come back."""

    def __init__(self, message: str, *, place: str = "", what: str = "") -> None:
        super().__init__(message)
        self.place, self.what = place, what  # which storage, as it may be shown, and what an attempt met


class _LocalFile:
    """An open descriptor; closed when the last reader lets go of it, so a cache eviction never races with a read."""

    def __init__(self, path: str) -> None:
        # O_NONBLOCK: opening a FIFO must not hang.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        self.size = status.st_size

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # absent when os.open failed
            os.close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        pieces, got = [], 0
        while got < size:  # one pread returns at most 2 GiB
            piece = os.pread(self.fd, size - got, offset + got)
            if not piece:
                raise OSError(f"cut since it was opened: it ends at byte {offset + got}")
            pieces.append(piece)
            got += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read(url: str, offset: int, size: int) -> bytes:
    """Return exactly `size` bytes from `offset` on.

    Raises:
        OutageError: the storage gives no answer; of a remote object, after retries.
        StorageError: the file cannot be opened or read, or does not hold that range.
        ValueError: the scheme of the URL is not allowed.
    """
    if is_remote(url):
        return _from_remote(remote.read, url, offset, size)
    try:
        file = _open(url)
        if offset < 0 or size < 0 or offset + size > file.size:  # checked first: pread allocates what it is asked for
            raise StorageError(f"{url}: bytes {offset} to {offset + size} are not inside its {file.size} bytes")
        return file.read(offset, size)
    except OSError as error:
        raise failure(url, error) from error


def size(url: str) -> int:
    """Return the size in bytes as it is now, also where the file has been replaced since it was opened.

    Raises:
        OutageError: the storage gives no answer; of a remote object, after retries.
        StorageError: there is no such regular file or object.
        ValueError: the scheme of the URL is not allowed.
    """
    if is_remote(url):
        return _from_remote(remote.size, url)
    path = local_path(url)
    try:
        status = os.stat(path)
    except OSError as error:
        raise failure(url, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{url}: not a regular file")
    return status.st_size


def failure(path: str, error: OSError) -> StorageError:
    """Return what an error of the operating system means for a file: gone for good, or no answer for now."""
    what = error.strerror or str(error)
    if error.errno not in _NO_ANSWER:
        return StorageError(f"{path}: {what}")
    _open.cache_clear()  # what is open stays stale when the server is back
    return OutageError(f"{path}: {what}", place=os.path.dirname(path) or ".", what=what)


def is_unmounted(url: str) -> bool:
    """Return whether the folder of a local file is gone or empty, as the place of a mount that is away."""
    try:
        return not os.listdir(os.path.dirname(local_path(url)) or ".")
    except FileNotFoundError:
        return True
    except OSError:
        return False


def forget(url: str) -> None:
    """Drop the open descriptors of this process, because the file at `url` has just been replaced."""
    check(url)
    _open.cache_clear()


def check(url: str) -> None:
    """Raise ValueError unless a URL can name a shard, here or elsewhere; nothing is opened."""
    remote.check(url) if is_remote(url) else local_path(url)


def file_name(url: str) -> str:
    """Return the last part of the path of a URL."""
    return os.path.basename(shown(url) if is_remote(url) else local_path(url))


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Write a file that appears under `path` only when it is whole and on disk; after an error nothing appears."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable: a renamed file can vanish in a power loss until its folder is synced."""
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_path(url: str) -> str:
    """Return the path of a plain path or a `file:` URL.

    Raises:
        ValueError: another scheme, `-`, an empty URL, or a NUL byte.
    """
    if not url or url == "-" or "\0" in url:
        raise ValueError(f"{url!r} is not a shard; give the path of a .tar file or a file:// URL.")
    scheme = _SCHEME.match(url)
    if not scheme:
        return url
    if scheme[1].lower() != "file":
        raise ValueError(
            f"{shown(url)!r}: '{scheme[1]}:' is not allowed here, only paths and file:// URLs, and http(s):// and "
            "s3:// for shards; copy them to a disk."
        )
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError(f"{url!r} names the host {parts.netloc!r}; write file:///absolute/path.")
    return local_path(unquote(parts.path))


def expand(pattern: str) -> list[str]:
    """Expand every `{000..123}` of a pattern; leading zeros of the first bound set the width. `*` finds local files.

    Raises:
        ValueError: a range runs backwards, the pattern stands for more than a million URLs (counted, not expanded), or
            no file matches.
    """
    if "*" in pattern:
        return _matching(pattern)
    pieces = _RANGE.split(pattern)  # text, low, high, text, low, high, text
    ranges, count = [], 1
    for low, high in zip(pieces[1::3], pieces[2::3], strict=True):
        if int(high) < int(low):
            raise ValueError(f"{pattern!r}: the range {low}..{high} runs backwards; write {high}..{low}.")
        ranges.append((len(low), range(int(low), int(high) + 1)))
        count *= int(high) - int(low) + 1
    if count > MAX_EXPANSION:
        raise ValueError(f"{pattern!r} stands for {count} shards; at most {MAX_EXPANSION} are allowed; use several.")
    # One list of words a piece: the texts stand for themselves.
    words = [[piece] for piece in pieces[0::3]]
    for at, (width, numbers) in enumerate(ranges):
        words.insert(2 * at + 1, [f"{number:0{width}d}" for number in numbers])
    return ["".join(chosen) for chosen in itertools.product(*words)]


def _matching(pattern: str) -> list[str]:
    found = sorted(glob(local_path(pattern)))
    if not found:
        raise ValueError(f"{pattern!r} matches no file; give a path that exists, or * where the names differ.")
    return found


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold a lock that ends with the process: what is killed blocks nobody."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_remote(function: Callable[..., _T], url: str, *arguments: int) -> _T:
    remote.check(url)
    try:
        return function(url, *arguments)
    except UnansweredError as error:
        raise OutageError(f"{shown(url)}: {error}", place=remote.place(url), what=error.what) from None
    except RemoteError as error:
        raise StorageError(f"{shown(url)}: {error}") from None


@lru_cache(maxsize=_MAX_OPEN)
def _open(url: str) -> _LocalFile:
    return _LocalFile(local_path(url))
