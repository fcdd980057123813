"""Tubelets: patches that span several frames, started from the patch embedding of an image model.

Axes: B batch, T frames, U frames of a tubelet, T' tubelets, C channels, H W pixels, h w patches, p q pixels of a patch,
S patches of a frame, D width. Source: arXiv:2103.15691, tubelet embedding and its initialisation.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


class CentralFrame:
    """Inflate a patch embedding so that a tubelet starts as its central frame."""

    def __call__(self, weight: Tensor, tubelet_size: int) -> Tensor:
        """Map [D, C, p, q] to [D, C, U, p, q]."""
        inflated = weight.new_zeros(*weight.shape[:2], tubelet_size, *weight.shape[2:])
        inflated[:, :, tubelet_size // 2] = weight
        return inflated


class FrameAverage:
    """Inflate a patch embedding so that a tubelet starts as the mean of its frames."""

    def __call__(self, weight: Tensor, tubelet_size: int) -> Tensor:
        """Map [D, C, p, q] to [D, C, U, p, q]."""
        return repeat(weight / tubelet_size, "d c p q -> d c u p q", u=tubelet_size)


class TubeletEmbed(nn.Module):
    """Linear embedding of tubelets; the weight has the shape and name of a 3D convolution's."""

    def __init__(self, *, patch_size: int, tubelet_size: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.weight = nn.Parameter(torch.empty(dim, 3, tubelet_size, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map [B, T, C, H, W] to [B, T', S, D]; T must be a multiple of `tubelet_size`."""
        u, p = self.tubelet_size, self.patch_size
        patches = rearrange(pixels, "b (t u) c (h p) (w q) -> b t (h w) (c u p q)", u=u, p=p, q=p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


def fill_tubelets(pixels: Tensor, frame_mask: Tensor | None, tubelet_size: int) -> tuple[Tensor, Tensor | None]:
    """Make every tubelet whole: unreal or missing frames repeat the last real frame before them.

    Args:
        pixels: [B, T, C, H, W].
        frame_mask: [B, T] bool, True = real; None = all real.

    Returns:
        Pixels with T a multiple of `tubelet_size`, and the mask [B, T'] of tubelets with at least one real frame.
    """
    missing = -pixels.shape[1] % tubelet_size
    if frame_mask is None:
        if missing:
            pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        return pixels, None
    frame_mask = F.pad(frame_mask, (0, missing))
    place = torch.arange(frame_mask.shape[1], device=pixels.device).expand_as(frame_mask)
    source = place.masked_fill(~frame_mask, -1).cummax(1).values  # [B, T] last real frame so far, -1 before the first
    source = torch.where(source < 0, frame_mask.int().argmax(1, keepdim=True), source)
    clip = torch.arange(pixels.shape[0], device=pixels.device)[:, None]
    return pixels[clip, source], rearrange(frame_mask, "b (t u) -> b t u", u=tubelet_size).any(-1)


def zero_cells(pixels: Tensor, hidden: Tensor) -> Tensor:
    """Zero the pixels [B, T, C, H, W] of the cells where `hidden` [B, T, h, w] is True."""
    p, q = pixels.shape[3] // hidden.shape[2], pixels.shape[4] // hidden.shape[3]
    return pixels.masked_fill(repeat(hidden, "b t h w -> b t 1 (h p) (w q)", p=p, q=q), 0.0)
