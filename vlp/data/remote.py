"""Ranges of http(s) and s3 objects, asked for until they are whole or their time is over. The only user of fsspec.

    read(url, offset, size) --> attempt: GET with a range --> status, range and length checked --> bytes
                                   |  429, 5xx, reset, timeout, short body: wait with jitter, try again;
                                   |  for too long: UnansweredError, and RemoteError if it is only the body that fails
                                   '--> 403, 404, no ranges, another length than asked for: RemoteError at once

Nothing larger than what was asked for is ever held, whatever a server sends. Secrets in a URL are never shown.
"""

import asyncio
import functools
import itertools
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

MAX_READ = 4 << 30  # bytes of one range; the largest video that is accepted
MAX_UNRANGED = 8 << 20  # bytes taken from the front of an object whose server ignores ranges

_MIN_BYTES_PER_S = 1 << 20  # a large range has a second more for each of these
_RETRIED = {408, 425, 429}  # and all from 500 on
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}
_WORDS = {
    401: "not authorised",
    403: "forbidden",
    404: "not found",
    410: "gone",
    416: "the range is outside the object",
}
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")
_BODY = re.compile("Payload|Incomplete|ResponseStreaming")  # names: the object broke off, and the server is there
_FINAL = re.compile("Certificate|InvalidU|NonHttpU|TooManyRedirects|ParamValidation|InvalidRegion|NoRegion")  # names
_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_chance = random.SystemRandom()  # forked workers must not wait in step
_file_systems: dict[tuple[int, str], Any] = {}  # by process: an event loop does not survive a fork


class Retry(NamedTuple):
    """How long a read is tried, in seconds."""

    budget_s: float = 60.0  # after which a read fails, and a second more for each MiB asked for
    first_wait_s: float = 0.25  # the longest first wait; doubled each time
    max_wait_s: float = 8.0
    idle_s: float = 15.0  # without a byte, after which one attempt is given up


RETRY = Retry()


class RemoteError(Exception):
    """An object cannot be read; the message says what happened and how often it was tried, and names no URL."""


class UnansweredError(RemoteError):
    """The server gave no answer, or none but "later", until the time of a read was over; `what` it said last."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


class _RefusedError(Exception):
    """Another attempt would end the same way."""


class _TransientError(Exception):
    """Another attempt may succeed."""


class _BodyError(_TransientError):
    """The server answered, with something else than the bytes asked for."""


class _Answer(NamedTuple):
    """The head of a response, and its body as it comes."""

    status: int
    content_range: str
    length: int | None
    encoding: str
    chunks: AsyncIterator[bytes]


_Opener = Callable[[Any, str, str], AbstractAsyncContextManager[_Answer]]


def is_remote(url: str) -> bool:
    """Return whether a URL is read by this module and not as a local file."""
    return url.partition(":")[0].lower() in _PACKAGES and ":" in url


def shown(url: str) -> str:
    """Return a URL as it may stand in logs: without user, password, query and fragment. A local path stays as it is."""
    if "://" not in url or url.lower().startswith("file:"):
        return url
    scheme, _, rest = url.partition(":")
    place = re.split(r"[?#]", rest.removeprefix("//"), maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def place(url: str) -> str:
    """Return the storage of an object as it may stand in logs: scheme and host or bucket."""
    return "/".join(shown(url).split("/", 3)[:3])


def check(url: str) -> None:
    """Raise ValueError unless a URL names a host or bucket and an object in it."""
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and len(parts.path) > 1
    except ValueError:  # a broken IPv6 address; the message of urllib would show the user and password
        whole = False
    if not whole or re.search(r"[\x00-\x1f\x7f]", url) or (" " in url and not url.lower().startswith("s3:")):
        raise ValueError(f"{shown(url)!r} names no object; write scheme://host-or-bucket/path.tar, a space as %20.")


def read(url: str, offset: int, size: int) -> bytes:
    """Return exactly `size` bytes from `offset` on.

    Raises:
        UnansweredError: no answer when the time was over.
        RemoteError: refused, not there, outside the object, or still not whole when the time was over.
    """
    if offset < 0 or not 0 <= size <= MAX_READ:
        raise RemoteError(f"bytes {offset} to {offset + size}; at most {MAX_READ} bytes are read at once")
    if not size:
        return b""

    async def attempt(file_system: Any, opener: _Opener) -> bytes:
        async with opener(file_system, url, f"bytes={offset}-{offset + size - 1}") as answer:
            return await _body(answer, offset, size)

    return _retrying(url, attempt, extra_s=size / _MIN_BYTES_PER_S)


def size(url: str) -> int:
    """Return the size of an object in bytes, by asking for its first byte: signed URLs often allow nothing but GET.

    Raises:
        RemoteError: as `read`, or the server does not tell.
    """

    async def attempt(file_system: Any, opener: _Opener) -> int:
        async with opener(file_system, url, "bytes=0-0") as answer:
            return _total(answer)

    return _retrying(url, attempt, extra_s=0)


def _retrying(url: str, attempt: Callable[[Any, _Opener], Awaitable[_T]], *, extra_s: float) -> _T:
    """Repeat an attempt until it succeeds, is refused, or the budget is over."""
    from fsspec.asyn import sync

    scheme = url.partition(":")[0].lower()
    file_system, opener = _file_system(scheme), _s3 if scheme == "s3" else _http
    start_s = time.monotonic()
    deadline = start_s + RETRY.budget_s + extra_s
    what, has_answered = "timed out", False
    for number in itertools.count(1):
        try:
            left_s = max(0.1, deadline - time.monotonic())
            result: Any = sync(file_system.loop, attempt, file_system, opener, timeout=left_s)
            return result
        except _RefusedError as error:
            raise RemoteError(str(error)) from None
        except Exception as error:
            failure = error
        if number == 1 or left_s > RETRY.idle_s or not isinstance(failure, TimeoutError):  # else our own deadline
            # Outside the handler: no traceback shows the errors of the library, which hold the URL.
            what, has_answered = _described(failure), _has_answered(failure)
        wait_s = _chance.uniform(0.5, 1) * min(RETRY.max_wait_s, RETRY.first_wait_s * 2 ** min(number - 1, 30))
        if time.monotonic() + wait_s >= deadline:
            message = f"{what}; tried {number} times in {time.monotonic() - start_s:.1f} s"
            raise RemoteError(message) if has_answered else UnansweredError(message, what)
        _log.info("%s: %s; attempt %d follows in %.1f s", shown(url), what, number + 1, wait_s)
        time.sleep(wait_s)
    raise AssertionError("the loop has no end")


def _has_answered(error: Exception) -> bool:
    """Tell an object that never comes whole from a server that is away."""
    return isinstance(error, _BodyError) or _BODY.search(type(error).__name__) is not None


def _described(error: Exception) -> str:
    """Return what a failed attempt met, in words without its URL; raise what no other attempt would change."""
    if isinstance(error, _TransientError):
        return str(error)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "timed out"
    module, name = type(error).__module__.partition(".")[0], type(error).__name__
    if _FINAL.search(name):
        raise RemoteError(f"refused: {name}")
    if "Credentials" in name or "Profile" in name:
        raise RemoteError(f"no credentials ({name}); set them as for the aws command, or FSSPEC_S3_ANON=true")
    if isinstance(error, OSError):
        return f"{name}: {error.strerror}" if error.strerror else name
    if module not in ("aiohttp", "aiobotocore", "botocore"):
        raise error
    return name


async def _body(answer: _Answer, offset: int, size: int) -> bytes:
    """Return the wanted bytes of an answer, and no more of it."""
    skip = _check_range(answer, offset, size)
    data = bytearray()
    async for chunk in answer.chunks:
        data += chunk
        if len(data) > skip + size and answer.status == 206:
            raise _RefusedError(f"the server sent more than the {size} bytes asked for")
        if len(data) >= skip + size:
            break
    if len(data) < skip + size:
        raise _BodyError(f"short: {max(0, len(data) - skip)} of {size} bytes came")
    return bytes(data) if len(data) == size else bytes(memoryview(data)[skip : skip + size])


def _check_range(answer: _Answer, offset: int, size: int) -> int:
    """Check what an answer claims to hold; return how many of its bytes come before the wanted ones."""
    total = _total(answer)
    if offset + size > total:
        raise _RefusedError(f"bytes {offset} to {offset + size} are not inside its {total} bytes")
    if answer.status == 206:
        if not answer.content_range.startswith(f"bytes {offset}-{offset + size - 1}/"):
            raise _BodyError(f"the server sent {answer.content_range!r:.80} and not bytes {offset}-")
        return 0
    if offset + size > MAX_UNRANGED:
        raise _RefusedError(
            "the server ignores byte ranges and sends the whole object; serve it with ranges, or copy it to a disk"
        )
    return offset


def _total(answer: _Answer) -> int:
    """Return the size of the object, after refusing whatever is no answer to a range request."""
    match = _CONTENT_RANGE.fullmatch(answer.content_range)
    if answer.status == 416 and match:
        return int(match[3])
    if answer.status in _RETRIED or answer.status >= 500:
        raise _TransientError(f"status {answer.status}")
    if answer.status not in (200, 206):
        raise _RefusedError(
            f"status {answer.status}" + f" ({_WORDS.get(answer.status, '')})" * (answer.status in _WORDS)
        )
    if answer.encoding not in ("", "identity"):
        raise _RefusedError(f"the server sends it as {answer.encoding!r:.40}, in which ranges mean something else")
    total = answer.length if answer.status == 200 else int(match[3]) if match else None
    if total is None:
        raise _RefusedError("the server does not say how large the object is")
    return total


def _file_system(scheme: str) -> Any:
    """Return this process's fsspec file system; made once, never shared with a forked process."""
    name = (os.getpid(), "s3" if scheme == "s3" else "http")
    if name not in _file_systems:
        try:
            made = _make_s3() if scheme == "s3" else _make_http()
        except ImportError as error:
            package = _PACKAGES[scheme]
            raise RemoteError(f"{scheme}: needs the package {package} ({error.name}); pip install {package}") from None
        _file_systems.setdefault(name, made)
    return _file_systems[name]


def _make_http() -> Any:
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=RETRY.idle_s, sock_read=RETRY.idle_s)
    # trust_env: proxies of the environment, and the passwords in ~/.netrc.
    client = {"timeout": timeout, "trust_env": True, "auto_decompress": False}
    return fsspec.filesystem("http", client_kwargs=client, encoded=True, skip_instance_cache=True)


def _make_s3() -> Any:
    import fsspec
    import s3fs  # noqa: F401, for a clear message where it is missing

    # One attempt: the retries are ours.
    config = {"connect_timeout": RETRY.idle_s, "read_timeout": RETRY.idle_s, "retries": {"total_max_attempts": 1}}
    return fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True)


@asynccontextmanager
async def _http(file_system: Any, url: str, wanted: str) -> AsyncIterator[_Answer]:
    session = await file_system.set_session()
    headers = {"Range": wanted, "Accept-Encoding": "identity"}
    async with session.get(file_system.encode_url(url), headers=headers) as response:
        head = response.headers
        yield _Answer(
            status=response.status,
            content_range=head.get("Content-Range", ""),
            length=response.content_length,
            encoding=head.get("Content-Encoding", ""),
            chunks=response.content.iter_chunked(1 << 20),
        )
        if not response.content.at_eof():
            response.close()  # else the connection would be kept for a rest that nobody reads


@asynccontextmanager
async def _s3(file_system: Any, url: str, wanted: str) -> AsyncIterator[_Answer]:
    from botocore.exceptions import ClientError

    bucket, _, key = url.partition("://")[2].partition("/")
    await file_system.set_session()
    client = await file_system.get_s3(bucket)
    try:
        answer = await client.get_object(Bucket=bucket, Key=key, Range=wanted)
    except ClientError as error:
        head = error.response.get("ResponseMetadata", {})
        status, names = int(head.get("HTTPStatusCode", 500)), head.get("HTTPHeaders", {})
        yield _Answer(status, names.get("content-range", ""), None, "", _pieces(_nothing))
        return
    async with answer["Body"] as body:
        yield _Answer(
            status=answer["ResponseMetadata"]["HTTPStatusCode"],
            content_range=answer.get("ContentRange", ""),
            length=answer.get("ContentLength"),
            encoding=answer.get("ContentEncoding", ""),
            chunks=_pieces(functools.partial(body.read, 1 << 20)),
        )


async def _pieces(take: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    while piece := await take():
        yield piece


async def _nothing() -> bytes:
    return b""
