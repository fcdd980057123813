"""A run must not stop because its log cannot be written: the disk that holds the job's output may be full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Tolerant:
    """A text stream whose failed writes are lost and raise nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written; the answer is always that all was."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if the disk lets us."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant() -> Iterator[None]:
    """Let standard output and error be tolerant inside the block.

    What could not be flushed by its end is dropped: else the interpreter would try once more and change the exit code.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Tolerant(stream) for stream in streams)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
