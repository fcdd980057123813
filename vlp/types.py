"""The types that travel between the parts of vlp.

Axes: B clips of a batch, T frames, H W pixels or grid cells, N tokens, P prefix tokens, D width, L text length, K other
clips or other texts of a sample.
NamedTuples and not dataclasses: DeepSpeed ZeRO-3, pytrees and torch.compile look for tensors inside tuples.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the only ignore value of label tensors


class Reason(IntEnum):
    """Why a slot of a batch holds no sample; `OK` means that it holds one. The numbers are stable: they are stored."""

    OK = 0
    PADDING = 1  # the tail of an epoch
    VIDEO_MISSING = 2  # a caption names a video that is not there
    VIDEO_EMPTY = 3  # zero bytes
    VIDEO_BROKEN = 4  # no container that can be read, or no decodable frame
    NO_VIDEO_STREAM = 5  # audio only
    VIDEO_TRUNCATED = 6  # ends before the wanted frame
    CODEC_REFUSED = 7
    LIMIT_EXCEEDED = 8  # pixels, frames, seconds or bytes above the limits of `vlp.data.probe`
    CAPTION_MISSING = 9
    CAPTION_BROKEN = 10  # not UTF-8, wrong JSON type, too long
    CHECKSUM = 11  # the bytes of a part differ from the index
    READ_FAILED = 12  # storage gave up after its retries
    DECODE_TIMEOUT = 13
    DECODE_CRASH = 14
    DUPLICATE_KEY = 15
    NO_SOUND = 16  # no sound stream, or none that decodes, where the sound is what is learnt from


class SampleError(Exception):
    """One sample cannot be used: `key` and `shard` name it, `reason` says why. Costs one slot, never the run."""

    def __init__(self, reason: Reason, key: str, shard: str, detail: str = "") -> None:
        super().__init__(reason, key, shard, detail)  # all arguments, so that it survives the way out of a worker
        self.reason, self.key, self.shard, self.detail = reason, key, shard, detail

    def __str__(self) -> str:
        return f"{self.key} in {self.shard}: {self.reason.name.lower()}" + (f" ({self.detail})" if self.detail else "")


class Batch(NamedTuple):
    """What one rank trains on in one forward pass. `frames` stay uint8 until they are on the device."""

    frames: Tensor  # [B, T, H, W, 3] uint8
    frame_mask: Tensor  # [B, T] bool, True = real
    times_s: Tensor  # [B, T] float32, seconds from the first frame of the video
    text_ids: Tensor  # [B, L] int64
    text_mask: Tensor  # [B, L] bool, True = real
    word_ids: Tensor  # [B, L] int64, which word of the caption a token belongs to; -1 for special tokens and padding
    more_frames: Tensor  # [B, K, T, H, W, 3] uint8, the other clips that `clip.more_clips` asked for
    more_frame_mask: Tensor  # [B, K, T] bool, True = real
    more_ids: Tensor  # [B, K, L] int64, the other texts that `texts` of the config chose; K is 0 with one caption
    more_mask: Tensor  # [B, K, L] bool, True = real; a text that is not there has none
    label: Tensor  # [B] int64, what is asked of the clip: a class or a place among the other texts; else IGNORE_INDEX
    valid: Tensor  # [B] bool, False = the slot is padding or a tombstone; never counted in a loss, never a negative
    status: Tensor  # [B] int64, a Reason
    sample_id: Tensor  # [B] int64, position in the source, -1 for padding
    key: Tensor  # [B] int64, counter key of (seed, epoch, sample): all randomness of views derives from it


def nothing_more(num_samples: int) -> dict[str, Tensor]:
    """Return the fields of a batch whose samples bring one clip and one text each, and no label."""
    nothing = torch.zeros(num_samples, 0, 1, dtype=torch.int64)
    return {
        "more_frames": torch.zeros(num_samples, 0, 1, 1, 1, 3, dtype=torch.uint8),
        "more_frame_mask": nothing.bool(),
        "more_ids": nothing,
        "more_mask": nothing.bool(),
        "label": torch.full((num_samples,), IGNORE_INDEX),
    }


class Tokens(NamedTuple):
    """A sequence of features."""

    x: Tensor  # [B, N, D]
    mask: Tensor  # [B, N] bool, True = real


class Grid(NamedTuple):
    """Video features that keep their place in time and space, and the class tokens, which have none."""

    x: Tensor  # [B, T, H, W, D]
    mask: Tensor  # [B, T] bool, True = real
    prefix: Tensor  # [B, P, D]; P is 0, 1 (one a clip) or T (one a frame)


class Fused(NamedTuple):
    """Both sides after fusion; `video` is None where the fusion only updates the text (cross attention)."""

    text: Tokens
    video: Grid | None


class AttentionMass(NamedTuple):
    """How much all queries of a fusion look at each token: summed over layers and queries, averaged over heads."""

    text: Tensor  # [B, L]
    video: Grid  # x [B, T, H, W, 1]


class Term(NamedTuple):
    """A loss as a sum and the number of things summed, so that it is divided once, by the global count."""

    total: Tensor  # scalar, sum over this rank
    count: Tensor  # scalar, float32, number of summed items on this rank
