"""Quantities that families with one space for clips and texts have in common; the class of a family names those it has.

    class Family(nn.Module):
        video_embed = shared_space.video_embed

A family keeps here what is the same to the letter in several of them, so that an objective may rely on it.

Axes: B clips, T frames, C channels, H W pixels or cells, E embedding.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlp.forward import quantity
from vlp.layers.pixels import normalised
from vlp.types import Grid, Tokens


@quantity
def pixels(self: Any, frames: Tensor) -> Tensor:
    """Normalise uint8 [B, T, H, W, C] on the device to float [B, T, C, H, W]."""
    return normalised(frames, self.pixel_affine)


@quantity
def video_embed(self: Any, video: Grid) -> Tensor:
    """Return unit vectors [B, E]."""
    return F.normalize(self.video_projection(self.video_pool(video)), dim=-1)


@quantity
def text_embed(self: Any, text: Tokens) -> Tensor:
    """Return unit vectors [B, E]."""
    return F.normalize(self.text_projection(self.text_pool(text)), dim=-1)


@quantity
def logit_scale(self: Any) -> Tensor:
    """Return 1 / temperature, a scalar."""
    return self.temperature()
