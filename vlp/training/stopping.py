"""Whether this rank wishes to stop: it was told to, it has done its share of steps, or the time of the job runs out."""

import time

from vlp.training import signals

_SHARE, _MOST_S = 0.05, 30.0  # kept free before the end of the job: a share of what is left at the start, or this


class Wish:
    """Asked at the end of each step and inside evaluations; the ranks then agree on the answer.

    Args:
        steps: of this attempt, after which it stops by itself; None = it does not.
        seconds: until the job is ended from outside; None = it is not.
    """

    def __init__(self, *, steps: int | None, seconds: float | None) -> None:
        self.steps, self.num_done = steps, 0
        self.step_s, self.save_s = 0.0, 0.0  # the longest of this attempt
        self._end = None if seconds is None else time.monotonic() + seconds
        self._spare_s = min(_MOST_S, _SHARE * (seconds or 0.0))
        self._since = time.monotonic()

    def __call__(self) -> str | None:
        """Return why to stop, or None."""
        if (name := signals.told()) is not None:
            return f"by {name}"
        if self.steps is not None and self.num_done >= self.steps:
            return f"by run.stop_after={self.steps}"
        if self._end is not None and self._end - time.monotonic() < self._needed_s():
            return "before the time of the job is over"
        return None

    def count_step(self) -> None:
        """Note that a step ends."""
        now = time.monotonic()
        if self.num_done:
            self.step_s = max(self.step_s, now - self._since)
        self.num_done, self._since = self.num_done + 1, now

    def restart(self) -> None:
        """Leave the time since the last step out of the next one's."""
        self._since = time.monotonic()

    def count_save(self, seconds: float) -> None:
        """Note how long a checkpoint took; its time is no step's."""
        self.save_s = max(self.save_s, seconds)
        self.restart()

    def count_commit(self, seconds: float) -> None:
        """Note how long a checkpoint took that was written in the background: the last one is waited for."""
        self.save_s = max(self.save_s, seconds)

    def _needed_s(self) -> float:
        """One more step and two saves must fit: the one that is due, and a slower one."""
        return self._spare_s + self.step_s + 2 * self.save_s
