"""From pictures as they are stored to what an encoder takes, on the device.

Axes: B clips, T frames, C channels, H W pixels.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


def pixel_affine(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the scale and the shift [2, C] that `normalised` takes, of the pixels' mean and deviation in [0, 1]."""
    return torch.stack([1 / (255 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std)])


def normalised(frames: Tensor, affine: Tensor) -> Tensor:
    """Map frames uint8 [B, T, H, W, C] to float [B, T, C, H, W] by an affine [2, C] of `pixel_affine`."""
    scale, shift = affine
    return rearrange(torch.addcmul(shift, frames, scale), "b t h w c -> b t c h w")
