"""Samples to a batch.

Axes: B clips, T frames, H W pixels, L text length, K other texts of a clip.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from vlp.data.fields import Sample
from vlp.data.text import Tokenizer
from vlp.types import Batch, Reason


def collate(
    samples: Sequence[Sample], tokenizer: Tokenizer, *, shape: tuple[int, int, int, int], buffer: Tensor | None = None
) -> Batch:
    """Stack samples into a batch of clips of `shape` [T, H, W, 3], cut to the longest of them; others are padded.

    Text is padded to the longest caption, rounded up to a multiple of 8: few lengths, few compilations. A tombstone
    keeps whole masks, because attention over nothing is not a number; `valid` says that it does not count.

    Args:
        samples: of one rank. tokenizer: of the captions.
        buffer: uint8 memory for the frames, which are then written once, where another process can read them.
    """
    longest = max((len(sample.frames) for sample in samples), default=shape[0])
    num_bytes = len(samples) * longest * math.prod(shape[1:])
    buffer = torch.empty(num_bytes, dtype=torch.uint8) if buffer is None else buffer
    frames = buffer[:num_bytes].view(len(samples), longest, *shape[1:])  # [B, T, H, W, 3]
    frame_mask = torch.zeros(frames.shape[:2], dtype=torch.bool)  # [B, T]
    times_s = torch.zeros(frames.shape[:2])  # [B, T]
    for row, sample in enumerate(samples):
        real = len(sample.frames)
        frames[row, :real] = torch.from_numpy(sample.frames)
        frames[row, real:] = 0
        frame_mask[row, :real] = True
        times_s[row, :real] = torch.from_numpy(sample.times_s)
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
        more_ids=more_ids,
        more_mask=more_mask,
        label=torch.tensor([sample.texts.label for sample in samples], dtype=torch.int64),
        valid=status == Reason.OK,
        status=status,
        sample_id=torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64),
        key=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
    )


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
