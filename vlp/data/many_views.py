"""Several looks at each clip of a test, in time and in space; the evaluation takes the mean of their scores.

"4x3" --> 12 views: 4 places in time x 3 crops from the beginning to the end of the long side
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from vlp.data.transforms import CenterCrop

_MOST = 64  # views of a clip: all are in memory at once


class View(NamedTuple):
    """One look."""

    time: float  # where the sampling looks, from 0 the earliest to 1 the latest it could draw
    transforms: tuple[Callable[..., np.ndarray], ...]


class Fixed:
    """In the place of a generator: every draw is the same number of [0, 1]."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self, size: int | None = None) -> Any:
        """Return the number, or so many of it."""
        return self.value if size is None else np.full(size, self.value)


def parse(text: str, transforms: Sequence[Callable[..., np.ndarray]]) -> tuple[View, ...]:
    """Return the views that "CLIPSxCROPS" asks for, where one clip and one crop are the centred ones.

    Raises:
        ValueError: it is not such a text, there are too many, or several crops of transforms without a centre crop.
    """
    found = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if found is None or int(found[1]) * int(found[2]) > _MOST:
        raise ValueError(f"views={text} must be CLIPSxCROPS, such as 4x3, and at most {_MOST} in all.")
    num_clips, num_crops = int(found[1]), int(found[2])
    if num_crops > 1 and not any(isinstance(each, CenterCrop) for each in transforms):
        raise ValueError(f"views={text}: clip.transforms_test has no CenterCrop to be moved; ask for {num_clips}x1.")
    crops = [tuple(_moved(each, place) for each in transforms) for place in _spread(num_crops)]
    return tuple(View((clip + 0.5) / num_clips, crop) for clip in range(num_clips) for crop in crops)


def _spread(num_crops: int) -> list[float]:
    return [0.5] if num_crops == 1 else [crop / (num_crops - 1) for crop in range(num_crops)]


def _moved(transform: Callable[..., np.ndarray], place: float) -> Callable[..., np.ndarray]:
    return replace(transform, place=place) if isinstance(transform, CenterCrop) else transform
