"""Fusion by text layers that look at the video.

Axes: B pairs, L words, N video tokens, D width of the fusion.
"""

from torch import nn

from vlp.layers.block import Block, drop_path_rates, match_width
from vlp.layers.grid import AllTokens, PrefixTokens
from vlp.types import Fused, Grid, Tokens


class CrossFusion(nn.Module):
    """Text blocks with cross attention to the video; only the text is updated. Source: arXiv:2107.07651.

    Deviation: pre-norm blocks, and a norm on the video, so that any encoder's scale fits.
    """

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
        reads: AllTokens | PrefixTokens | None = None,
    ) -> None:
        """Build the fusion; `reads`: which video features the text sees, all where not given."""
        super().__init__()
        self.dim, self.video_dim, self.text_dim = dim, video_dim, text_dim
        self.updates_video = False
        self.reads = reads or AllTokens()
        self.text_proj = match_width(text_dim, dim)
        self.video_norm = nn.LayerNorm(video_dim)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                dropout=dropout,
                cross_dim=video_dim,
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, video: Grid, text: Tokens) -> Fused:
        """Fuse text [B, L, D_text] with a grid of width D_video; returns text of width D and no video."""
        seen = self.reads(video)
        context = self.video_norm(seen.x)  # [B, N, D_video]
        x = self.text_proj(text.x)
        for block in self.blocks:
            x = block(x, text.mask, context, seen.mask)
        return Fused(Tokens(self.norm(x), text.mask), None)
