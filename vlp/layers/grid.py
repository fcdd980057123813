"""A `Grid` as a sequence and back.

Axes: B batch, T frames, H W cells, P prefix tokens, D width.
A prefix holds class tokens: none, one a clip (P = 1), or one a frame (P = T).
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vlp.types import Grid, Tokens


def prefix_mask(grid: Grid) -> Tensor:
    """Return [B, P] bool: the class token of a frame is as real as the frame, that of a clip as any of its frames."""
    num_prefix, num_frames = grid.prefix.shape[1], grid.mask.shape[1]
    assert num_prefix in (0, 1, num_frames), f"{num_prefix} prefix tokens for {num_frames} frames"
    return grid.mask if num_prefix == num_frames else grid.mask.any(1, keepdim=True).expand(-1, num_prefix)


def grid_tokens(grid: Grid) -> Tokens:
    """Return the sequence [prefix; cells of frame 0; cells of frame 1; ...], [B, P + T*H*W, D]."""
    height, width = grid.x.shape[2:4]
    cells = rearrange(grid.x, "b t h w d -> b (t h w) d")
    cell_mask = repeat(grid.mask, "b t -> b (t s)", s=height * width)
    if grid.prefix.shape[1] == 0:
        return Tokens(cells, cell_mask)
    return Tokens(torch.cat([grid.prefix, cells], dim=1), torch.cat([prefix_mask(grid), cell_mask], dim=1))


def tokens_grid(x: Tensor, like: Grid) -> Grid:
    """Undo `grid_tokens`: give the sequence `x` [B, P + T*H*W, D] the places of the grid `like`."""
    num_prefix = like.prefix.shape[1]
    _, num_frames, height, width, _ = like.x.shape
    cells = rearrange(x[:, num_prefix:], "b (t h w) d -> b t h w d", t=num_frames, h=height, w=width)
    return Grid(cells, like.mask, x[:, :num_prefix])


class AllTokens(nn.Module):
    """Read every feature of a grid: `grid_tokens`."""

    def forward(self, grid: Grid) -> Tokens:
        """Map a grid to [B, P + T*H*W, D]."""
        return grid_tokens(grid)


class PrefixTokens(nn.Module):
    """Read the class tokens of a grid only."""

    def forward(self, grid: Grid) -> Tokens:
        """Map a grid to [B, P, D].

        Raises:
            ValueError: there are none.
        """
        if grid.prefix.shape[1] == 0:
            raise ValueError("PrefixTokens needs class tokens, which these video features do not have; use AllTokens.")
        return Tokens(grid.prefix, prefix_mask(grid))
