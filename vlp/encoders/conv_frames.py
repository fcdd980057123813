"""A few strided convolutions on every frame: a video encoder small enough to learn from scratch in minutes.

Axes: B clips, T frames, H W pixels, h w grid cells, D width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vlp.types import Grid


class ConvFrames(nn.Module):
    """Convolutions with GELU between them, frame by frame; cells know nothing of other frames.

    Source: arXiv:2106.14881 (early convolutions), without batch norm, whose statistics would mix clips.
    """

    def __init__(self, *, widths: Sequence[int], first_stride: int = 4) -> None:
        """Build the stem.

        Args:
            widths: channels after each convolution. The first has a kernel and stride of `first_stride` pixels, each
                further one a kernel of 3 and a stride of 2.
        """
        super().__init__()
        self.patch_embed = nn.Conv2d(3, widths[0], first_stride, first_stride)
        layers: list[nn.Module] = [nn.GELU()]
        for source, target in pairwise(widths):
            layers += [nn.Conv2d(source, target, 3, 2, 1), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.dim = widths[-1]
        self.patch_size = first_stride * 2 ** (len(widths) - 1)
        self.tubelet_size = 1

    def forward(self, pixels: Tensor, frame_mask: Tensor | None = None, hidden: Tensor | None = None) -> Grid:
        """Encode clips.

        Args:
            pixels: [B, T, 3, H, W] float, normalised; H and W are multiples of `patch_size`.
            frame_mask: [B, T] bool, True = real.
            hidden: [B, T, h, w] bool, True = what the first convolution, whose patches do not overlap, gives for this
                cell is replaced by zeros.

        Returns:
            Grid of [B, T, h, w, D] without prefix.
        """
        num_clips = pixels.shape[0]
        patches = self.patch_embed(rearrange(pixels, "b t c h w -> (b t) c h w"))
        if hidden is not None:
            side = patches.shape[2] // hidden.shape[2]
            patches = patches.masked_fill(repeat(hidden, "b t h w -> (b t) 1 (h p) (w q)", p=side, q=side), 0.0)
        cells = rearrange(self.convolutions(patches), "(b t) d h w -> b t h w d", b=num_clips)
        mask = torch.ones_like(cells[:, :, 0, 0, 0], dtype=torch.bool) if frame_mask is None else frame_mask
        return Grid(cells, mask, cells.new_zeros(num_clips, 0, self.dim))
