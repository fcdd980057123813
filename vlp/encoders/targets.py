"""What hidden patches are to be predicted as: numbers of each cell of a video, computed without gradient.

Axes: B clips, T frames, C channels, H W pixels, h w cells, p q pixels of a cell, O orientations, E numbers of a cell.
Each has `dim` (E) and maps frames uint8 [B, T, H, W, 3] and frame_mask [B, T] to [B, T, h, w, E].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlp.encoders.timm_video import TimmFrames


class CellPixels(nn.Module):
    """The pixels of a cell, averaged to `side` x `side` colours, in units of the full scale."""

    def __init__(self, *, patch_size: int, side: int = 8) -> None:
        super().__init__()
        if patch_size % side:
            raise ValueError(f"side={side} does not divide patch_size={patch_size}; choose a divisor.")
        self.patch_size, self.side, self.dim = patch_size, side, 3 * side * side

    @torch.no_grad()
    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Map [B, T, H, W, 3] uint8 to [B, T, h, w, 3 side side]."""
        images = rearrange(frames, "b t h w c -> (b t) c h w").float() / 255.0
        small = F.avg_pool2d(images, self.patch_size // self.side)
        return rearrange(small, "(b t) c (h p) (w q) -> b t h w (c p q)", t=frames.shape[1], p=self.side, q=self.side)


class OrientedGradients(nn.Module):
    """Histograms of the directions of brightness changes, normalised in each cell. Source: arXiv:2112.09133, 3.2 (HOG).

    Args:
        patch_size: pixels of a cell of the encoder. cell: pixels of a histogram. num_orientations: O, unsigned.
    """

    def __init__(self, *, patch_size: int, cell: int = 8, num_orientations: int = 9) -> None:
        super().__init__()
        if patch_size % cell:
            raise ValueError(f"cell={cell} does not divide patch_size={patch_size}; choose a divisor.")
        self.patch_size, self.cell, self.num_orientations = patch_size, cell, num_orientations
        self.dim = 3 * num_orientations * (patch_size // cell) ** 2

    @torch.no_grad()
    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Map [B, T, H, W, 3] uint8 to [B, T, h, w, 3 O n n] with n histograms a side; each cell has unit length."""
        images = F.pad(rearrange(frames, "b t h w c -> (b t) c h w").float() / 255.0, (1, 1, 1, 1), mode="replicate")
        across = images[..., 1:-1, 2:] - images[..., 1:-1, :-2]  # [B*T, C, H, W]
        down = images[..., 2:, 1:-1] - images[..., :-2, 1:-1]
        strength = torch.hypot(across, down)
        angle = torch.atan2(down, across) % math.pi  # unsigned: an edge is the same from both sides
        number = (angle * (self.num_orientations / math.pi)).floor().long() % self.num_orientations
        votes = F.one_hot(number, self.num_orientations) * strength[..., None]
        votes = rearrange(votes, "n c h w o -> n (c o) h w")
        histograms = F.avg_pool2d(votes, self.cell)
        n = self.patch_size // self.cell
        cells = rearrange(histograms, "(b t) e (h p) (w q) -> b t h w (e p q)", t=frames.shape[1], p=n, q=n)
        return F.normalize(cells, dim=-1)


class ImageFeatures(nn.Module):
    """Features of a frozen timm image model on each frame, a vector a cell, without mean and deviation.

    Source: arXiv:2209.01540, 3.2 (there a Swin transformer for ImageNet).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        name: str,
        size: int,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = TimmFrames(
            name=name,
            num_frames=1,
            size=size,
            pretrained=pretrained,
            checkpoint_path=checkpoint_path,
            overrides=overrides,
            frozen=True,
            time_positions=False,
        )
        self.dim: int = self.model.dim
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]), persistent=False)

    @torch.no_grad()
    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Map [B, T, H, W, 3] uint8 to [B, T, h, w, E]."""
        pixels = (frames.float() / 255.0 - self.mean) / self.std
        features = self.model(rearrange(pixels, "b t h w c -> b t c h w"), frame_mask).x
        return F.layer_norm(features, (self.dim,))
