"""Waiting for storage that gives no answer, which is no fault of a sample: it may come back.

    read --> OutageError: say so, wait, read again ... until the limit is over --> OutageError for good
        '--> StorageError, SampleError: no other attempt would change it

A process that takes samples is told about once a second while it has to wait (`Waiting`), and is never silent.
"""

import logging
import random
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from vlp.data.storage import OutageError

OUTAGE_S = 7200.0  # longer than most repairs, and shorter than a night of an idle cluster

_SAY_EVERY_S = 60.0
_MAX_PAUSE_S = 8.0  # between two attempts, besides what each of them takes
_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_chance = random.SystemRandom()  # workers that wait must not come back in step


class Outage(NamedTuple):
    """Storage that gives no answer; times by the monotonic clock of this machine."""

    place: str  # what storage, as it may be shown
    what: str  # what the last attempt met
    since: float
    limit_s: float

    def text(self) -> str:
        """Return one line: what storage, since how long, and until when it is waited for."""
        now = time.monotonic()
        end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + self.since + self.limit_s - now))
        return (
            f"{self.place} gives no answer ({self.what}) for {now - self.since:.0f} s; waiting for it until {end} "
            f"(data.outage_s={self.limit_s:g})"
        )


class Waiting(Protocol):
    """Called about once a second while the next result is not there; may raise, which ends the waiting."""

    def __call__(self, outage: Outage | None) -> None: ...


class Announcer:
    """Says an outage in the log, about once a minute."""

    def __init__(self) -> None:
        self._said: float | None = None

    def __call__(self, outage: Outage | None) -> None:
        now = time.monotonic()
        if outage is not None and (self._said is None or now - self._said >= _SAY_EVERY_S):
            self._said = now
            _log.warning("%s", outage.text())


def patiently(read: Callable[[], _T], *, limit_s: float, tell: Callable[[Outage], None]) -> _T:
    """Return what `read` returns, reading again while storage gives no answer.

    Args:
        read: may raise OutageError after the time that a single read is tried.
        limit_s: seconds from the beginning of the first attempt of an outage. tell: called after each failed attempt.

    Raises:
        OutageError: the limit is over; and whatever else `read` raises.
    """
    since = time.monotonic()
    while True:
        try:
            return read()
        except OutageError as error:
            outage = Outage(error.place, error.what, since, limit_s)
        left_s = since + limit_s - time.monotonic()
        if left_s <= 0:
            raise OutageError(
                f"{outage.place} gave no answer ({outage.what}) for {limit_s - left_s:.0f} s, allowed are "
                f"data.outage_s={limit_s:g}",
                place=outage.place,
                what=outage.what,
            )
        tell(outage)
        time.sleep(min(left_s, _chance.uniform(0.1, 1) * min(_MAX_PAUSE_S, limit_s / 10)))
