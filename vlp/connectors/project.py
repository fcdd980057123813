"""Another width.

Axes: B clips, T frames, H W cells, P prefix tokens, D width.
"""

from torch import nn

from vlp.layers.block import init_linears
from vlp.types import Grid


class Project(nn.Module):
    """One linear layer on every cell and class token."""

    def __init__(self, *, in_dim: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.in_dim, self.dim = in_dim, dim
        self.linear = nn.Linear(in_dim, dim, bias=bias)
        init_linears(self)

    def forward(self, grid: Grid) -> Grid:
        """Map a grid of width `in_dim` to one of width `dim`."""
        return Grid(self.linear(grid.x), grid.mask, self.linear(grid.prefix))
