"""Places and a class token for the cells of an encoder that has neither.

Axes: B clips, T frames, H W cells, D width.
"""

import torch
from torch import Tensor, nn

from vlp.layers.block import match_width
from vlp.layers.position import LearnedPositions, SpacePositions
from vlp.types import Grid


class FrameTokens(nn.Module):
    """A class token in front of each frame, tables of space and time, and a norm. Source: arXiv:2111.12681, 3.1.

    Args:
        in_dim: width of what comes in; projected where it is not `dim`. num_frames: rows of the table of times.
        size: pixels a side of a frame. patch_size: of a cell.
    """

    def __init__(self, *, in_dim: int, dim: int, num_frames: int, size: int, patch_size: int) -> None:
        super().__init__()
        self.in_dim, self.dim = in_dim, dim
        self.project = match_width(in_dim, dim)
        side = size // patch_size
        self.class_token = ClassToken(dim=dim)
        self.places = SpacePositions(height=side, width=side, dim=dim)
        self.times = LearnedPositions(length=num_frames, dim=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, grid: Grid) -> Grid:
        """Map a grid of width `in_dim` to one of width D with a prefix [B, T, D]; a prefix that it had is dropped."""
        x = self.project(grid.x)
        cells = self.norm(self.times(self.places(x)))
        prefix = self.norm(self.times(self.class_token(x[:, :, 0, 0])))
        return Grid(cells, grid.mask, prefix)


class ClassToken(nn.Module):
    """One learned vector, wherever it is asked for."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.table, std=0.02, a=-0.04, b=0.04)

    def forward(self, like: Tensor) -> Tensor:
        """Return the vector in the shape of `like` [..., D]."""
        return self.table.expand_as(like)
