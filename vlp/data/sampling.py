"""When to look: times of frames, in seconds from the first displayed frame, sorted, each with a frame to show.

All take what the index knows of a video (`duration_s`, 0 for a still image, and `fps`, its average rate) and a
generator; without one the choice is the centred one, for tests. A still image is looked at, at time 0, as often as
is asked.

T times.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Draws(Protocol):
    """What a sampling asks of a generator: numbers from 0 to 1."""

    def random(self, size: int | None = None) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Segments:
    """One time in each of `num_frames` equal segments of the video: at random inside it, or its middle. Returns [T]."""

    num_frames: int

    def __post_init__(self) -> None:
        _check_positive("num_frames", self.num_frames)

    def __call__(self, duration_s: float, fps: float, rng: Draws | None) -> np.ndarray:
        inside = 0.5 if rng is None else rng.random(self.num_frames)
        times_s = (np.arange(self.num_frames) + inside) * (duration_s / self.num_frames)
        return _shown(times_s, duration_s, fps)


@dataclass(frozen=True, kw_only=True)
class Fps:
    """As many frames as the video has at rate `fps`, evenly spaced, at least one: at a random phase, or centred.

    Returns at most `num_frames` times: longer videos are covered evenly, at a lower rate. A still image gives one time.
    """

    num_frames: int
    fps: float

    def __post_init__(self) -> None:
        _check_positive("num_frames", self.num_frames)
        _check_positive("fps", self.fps)

    def __call__(self, duration_s: float, fps: float, rng: Draws | None) -> np.ndarray:
        num_times = min(max(1, int(duration_s * self.fps + 1e-6)), self.num_frames)  # 1e-6: 2.9999999 frames are three
        step_s = duration_s / num_times if num_times == self.num_frames else 1 / self.fps
        rest_s = duration_s - (num_times - 1) * step_s  # the first time may be anywhere in it
        start_s = rest_s * (0.5 if rng is None else rng.random())
        return _shown(start_s + np.arange(num_times) * step_s, duration_s, fps)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """`num_frames` evenly spaced times in a window of `window_s`, at a random place of the video or its middle.

    Returns [T]. A shorter video is its own window.
    """

    num_frames: int
    window_s: float

    def __post_init__(self) -> None:
        _check_positive("num_frames", self.num_frames)
        _check_positive("window_s", self.window_s)

    def __call__(self, duration_s: float, fps: float, rng: Draws | None) -> np.ndarray:
        window_s = min(self.window_s, duration_s)
        start_s = (duration_s - window_s) * (0.5 if rng is None else rng.random())
        times_s = start_s + (np.arange(self.num_frames) + 0.5) * (window_s / self.num_frames)
        return _shown(times_s, duration_s, fps)


def _shown(times_s: np.ndarray, duration_s: float, fps: float) -> np.ndarray:
    """Move times behind the middle of the last frame to it: durations are rounded, and that frame surely exists."""
    last_s = duration_s - 0.5 / fps if fps > 0 else float(np.nextafter(duration_s, 0))
    return times_s.clip(0, max(0.0, last_s))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        raise ValueError(
            f"{name}={value} must be positive and finite; change it where the config chooses the sampling."
        )
