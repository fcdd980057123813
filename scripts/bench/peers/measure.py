"""What the loading peers have in common: how a sample becomes a clip, and how samples and batches are counted."""

import time
import zlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

import clips
import numpy as np
import torch

NUM_FRAMES, SIDE = 8, 224
WARM_UP = 150  # samples: shuffle buffers are full


def clip(data: bytes, method: str, width: int, height: int, duration_s: float) -> torch.Tensor:
    """Return the middle square of 8 evenly spaced frames, uint8 [T, H, W, 3]."""
    times_s = ((np.arange(NUM_FRAMES) + 0.5) * duration_s / NUM_FRAMES).tolist()
    frames = torch.as_tensor(getattr(clips, method)(data, times_s, (width, height)))
    left = (frames.shape[2] - SIDE) // 2
    return frames[:, :, left : left + SIDE]


def batch_rate(batches: Iterable[Any], *, skip: int, count: int) -> float:
    """Return clips a second of wall time over `count` batches, once `skip` have passed."""
    came = iter(batches)
    for batch in islice(came, skip):
        frames = batch[0]
    began, num_clips = time.perf_counter(), 0
    for batch in islice(came, count):
        frames = batch[0]
        num_clips += len(frames)
    seconds = time.perf_counter() - began
    assert frames.shape[1:] == (NUM_FRAMES, SIDE, SIDE, 3) and frames.dtype == torch.uint8, frames.shape
    return num_clips / seconds


def sample_rate(samples: Iterable[tuple[Any, Any]], *, count: int, touch: bool) -> float:
    """Return samples a second of CPU time; with `touch` every byte of the video is read once by whoever asked."""
    came = iter(samples)
    for video, text in islice(came, WARM_UP):
        assert len(video) > 10_000 and len(text) > 10
    began = time.process_time()
    num = 0
    for video, _ in islice(came, count):
        if touch:
            zlib.crc32(video)
        num += 1
    seconds = time.process_time() - began
    assert num == count, f"{num} of {count} samples"
    return count / seconds
