"""Fusion by one attention over words and video together.

Axes: B pairs, L words, N video tokens, D width of the fusion.
"""

import torch
from torch import nn

from vlp.layers.block import Block, drop_path_rates, match_width
from vlp.layers.grid import grid_tokens, tokens_grid
from vlp.types import Fused, Grid, Tokens


class JointFusion(nn.Module):
    """Transformer over the sequence [text; video], each side seeing both. Source: arXiv:2111.12681."""

    def __init__(
        self,
        *,
        dim: int,
        video_dim: int,
        text_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.video_dim, self.text_dim = dim, video_dim, text_dim
        self.updates_video = True
        self.text_proj = match_width(text_dim, dim)
        self.video_proj = match_width(video_dim, dim)
        self.modality = nn.Parameter(torch.empty(2, dim))  # text, video
        self.blocks = nn.ModuleList(
            Block(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=rate, dropout=dropout)
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.modality, std=0.02, a=-0.04, b=0.04)

    def forward(self, video: Grid, text: Tokens) -> Fused:
        """Fuse a grid of width D_video and text [B, L, D_text]; both come back with width D."""
        cells = grid_tokens(video)
        words = self.text_proj(text.x) + self.modality[0]
        x = torch.cat([words, self.video_proj(cells.x) + self.modality[1]], dim=1)  # [B, L + N, D]
        mask = torch.cat([text.mask, cells.mask], dim=1)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        length = text.x.shape[1]
        return Fused(Tokens(x[:, :length], text.mask), tokens_grid(x[:, length:], video))
