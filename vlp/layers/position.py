"""Positions in time and space: learned tables, their interpolation, and the fixed sine table.

Axes: B batch, T frames, L length, H W cells, D width.
Tables are modules of their own: under ZeRO-3 a parameter may be read only inside its owner's forward.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """Add row i of a learned table to place i of axis 1: frames of a video, words of a text."""

    def __init__(self, *, length: int, dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(length, dim))
        if std:
            nn.init.trunc_normal_(self.table, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, ..., D] to the same shape; a shorter input uses the first rows.

        Raises:
            ValueError: the input is longer than the table.
        """
        length, rows = x.shape[1], self.table.shape[0]
        if length > rows:
            raise ValueError(
                f"{length} places but the table of positions has {rows}; build the model for {length} (clip.num_frames "
                f"or the text's max_length), or feed at most {rows}."
            )
        return x + self.table[:length].view(length, *[1] * (x.ndim - 3), -1)  # [L, 1..., D] against [B, L, ..., D]


class SpacePositions(nn.Module):
    """Add a learned table of cells to every frame; resized to the grid of the input where that differs."""

    def __init__(self, *, height: int, width: int, dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(height, width, dim))
        if std:
            nn.init.trunc_normal_(self.table, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, H, W, D] to the same shape."""
        return x + resize_space(self.table, x.shape[2], x.shape[3])


def resize_time(table: Tensor, length: int) -> Tensor:
    """Interpolate a table [L, D] linearly to [length, D]; first and last rows stay first and last."""
    if length == table.shape[0]:
        return table
    rows = rearrange(table, "l d -> 1 d l")
    return rearrange(F.interpolate(rows, size=length, mode="linear", align_corners=True), "1 d l -> l d")


def resize_space(table: Tensor, height: int, width: int) -> Tensor:
    """Interpolate a table [H, W, D] to [height, width, D], bicubic with antialiasing."""
    if (height, width) == tuple(table.shape[:2]):
        return table
    plane = rearrange(table, "h w d -> 1 d h w")
    return rearrange(F.interpolate(plane, (height, width), mode="bicubic", antialias=True), "1 d h w -> h w d")


def sine_table(length: int, dim: int) -> Tensor:
    """Return the fixed table [length, dim] of sines and cosines. Source: arXiv:1706.03762, section 3.5.

    Deviation: the sines fill the first half of the width and the cosines the second, instead of alternating.
    """
    if dim % 2:
        raise ValueError(f"dim={dim} is odd; a sine table needs an even width.")
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, dim, 2) / dim)  # [D/2]
    angles = torch.arange(length)[:, None] * rates  # [L, D/2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
