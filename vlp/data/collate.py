"""Samples to a batch.

Axes: B clips, T frames, H W pixels, L text length, K other clips or other texts of a sample.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vlp.data.fields import Sample
from vlp.data.text import Tokenizer
from vlp.types import Batch, Reason, nothing_more


def collate(
    samples: Sequence[Sample], tokenizer: Tokenizer, *, shape: tuple[int, int, int, int], buffer: Tensor | None = None
) -> Batch:
    """Stack samples into a batch of clips of `shape` [T, H, W, 3], cut to the longest of them; others are padded.

    Text is padded to the longest caption, rounded up to a multiple of 8: few lengths, few compilations. A tombstone
    keeps whole masks, because attention over nothing is not a number; `valid` says that it does not count.

    Args:
        samples: of one rank. tokenizer: of the captions.
        buffer: uint8 memory for the frames of all clips, which are then written once, where another process can read
            them.
    """
    clips = [[sample.frames, *(clip.frames for clip in sample.more)] for sample in samples]  # of each 1 + K
    longest = max((len(frames) for row in clips for frames in row), default=shape[0])
    shape = (longest, *shape[1:])
    num_bytes = sum(map(len, clips)) * math.prod(shape)
    buffer = torch.empty(num_bytes, dtype=torch.uint8) if buffer is None else buffer
    frames, frame_mask = _stack([row[0] for row in clips], shape, buffer)
    times_s = torch.zeros(frame_mask.shape)  # [B, T]
    for row, sample in enumerate(samples):
        times_s[row, : len(sample.times_s)] = torch.from_numpy(sample.times_s)
    more_frames, more_frame_mask = _other_clips([row[1:] for row in clips], shape, buffer[frames.numel() :])
    text = tokenizer.encode([sample.texts.first for sample in samples])
    more_ids, more_mask = _other_texts(samples, tokenizer)
    status = torch.tensor([sample.status for sample in samples], dtype=torch.int64)
    return Batch(
        frames=frames,
        frame_mask=frame_mask,
        times_s=times_s,
        text_ids=text.ids,
        text_mask=text.mask,
        word_ids=text.word_ids,
        more_frames=more_frames,
        more_frame_mask=more_frame_mask,
        more_ids=more_ids,
        more_mask=more_mask,
        label=torch.tensor([sample.texts.label for sample in samples], dtype=torch.int64),
        valid=status == Reason.OK,
        status=status,
        sample_id=torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64),
        key=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
    )


def _stack(clips: Sequence[np.ndarray], shape: tuple[int, ...], buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Write clips into the beginning of `buffer`, each padded to `shape` [T, H, W, 3]; return them and their mask."""
    frames = buffer[: len(clips) * math.prod(shape)].view(len(clips), *shape)
    mask = torch.zeros(frames.shape[:2], dtype=torch.bool)
    for row, clip in enumerate(clips):
        real = len(clip)
        frames[row, :real] = torch.from_numpy(clip)
        frames[row, real:] = 0
        mask[row, :real] = True
    return frames, mask


def _other_clips(
    clips: Sequence[Sequence[np.ndarray]], shape: tuple[int, ...], buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the K other clips of each of B samples, in `buffer`, as [B, K, T, H, W, 3], and their mask [B, K, T]."""
    num_others = max(map(len, clips), default=0)
    if not num_others:
        nothing = nothing_more(len(clips))
        return nothing["more_frames"], nothing["more_frame_mask"]
    assert all(len(others) == num_others for others in clips), "a reader gives every sample the same number of clips"
    stacked = _stack([clip for others in clips for clip in others], shape, buffer)
    frames, mask = (x.unflatten(0, (-1, num_others)) for x in stacked)
    return frames, mask


def _other_texts(samples: Sequence[Sample], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, K, L] of the other texts; K is that of the sample with the most, 0 if none has any."""
    num_others = max((len(sample.texts.others) for sample in samples), default=0)
    rows = [(*sample.texts.others, *[None] * (num_others - len(sample.texts.others))) for sample in samples]
    text = tokenizer.encode([other or "" for row in rows for other in row])
    there = torch.tensor([other is not None for row in rows for other in row], dtype=torch.bool)
    ids, mask = (
        rearrange(x, "(b k) l -> b k l", k=num_others) if num_others else x.new_zeros(len(samples), 0, x.shape[1])
        for x in (text.ids, text.mask & there[:, None])
    )
    return ids, mask
