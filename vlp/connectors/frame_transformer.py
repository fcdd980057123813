"""One vector a frame, and a transformer over the frames.

Axes: B clips, T frames, H W cells, C width of the input, D width.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vlp.layers.block import Block
from vlp.layers.position import LearnedPositions
from vlp.types import Grid


class FrameTransformer(nn.Module):
    """Flatten the cells of a frame into one vector, let the frames see each other, tell the cells what came out.

    Flattening keeps the place of things in the frame, which a mean over cells loses and motion is made of. What changed
    since the frame before enters each vector too. The prefix of the result holds the frame vectors, one a frame; every
    cell becomes its own projection plus its frame's vector.

    Source: the frame transformer of arXiv:2104.08860 ("seqTransf"), the temporal difference of arXiv:2106.11097.
    Deviation: frame vectors come from flattened cells, not from a class token; differences are added to the frames in
    place of tokens between them; cells are kept.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        dim: int,
        num_frames: int,
        size: int,
        patch_size: int,
        depth: int,
        num_heads: int,
        time_std: float = 0.02,
    ) -> None:
        """Build the stage.

        Args:
            in_dim: C. dim: D.
            num_frames: most frames of a clip, the rows of the table of times.
            size, patch_size: pixels a side of a frame and of a cell; the stage is bound to this number of cells.
            depth: transformer blocks. num_heads: of each.
            time_std: deviation of the table of times at first; from scratch, large ones (0.5) learn order sooner.
        """
        super().__init__()
        self.in_dim, self.dim = in_dim, dim
        flat_dim = (size // patch_size) ** 2 * in_dim
        self.norm_in = nn.LayerNorm(flat_dim)  # else a fresh table of times drowns what a fresh encoder says
        self.frame, self.change = nn.Linear(flat_dim, dim), nn.Linear(flat_dim, dim, bias=False)
        self.time_positions = LearnedPositions(length=num_frames, dim=dim, std=time_std)
        self.blocks = nn.ModuleList(Block(dim=dim, num_heads=num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.cells = nn.Linear(in_dim, dim)

    def forward(self, grid: Grid) -> Grid:
        """Map a grid [B, T, H, W, C] to [B, T, H, W, D] with prefix [B, T, D]; its class tokens are left out."""
        flat = self.norm_in(rearrange(grid.x, "b t h w c -> b t (h w c)"))
        change = F.pad(flat[:, 1:] - flat[:, :-1], (0, 0, 1, 0))  # the first frame has none before it
        frames = self.time_positions(self.frame(flat) + self.change(change))
        for block in self.blocks:
            frames = block(frames, grid.mask)
        frames = self.norm(frames)  # [B, T, D]
        return Grid(self.cells(grid.x) + frames[:, :, None, None], grid.mask, frames)
