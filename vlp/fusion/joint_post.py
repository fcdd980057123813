"""Fusion by the layers of BERT over words and video together, and where its attention goes.

Axes: B pairs, L words, N video tokens, M = L + N, H heads, D width of the fusion.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from vlp.layers.attention import SelfAttention
from vlp.layers.block import Mlp, init_linears, match_width
from vlp.layers.grid import grid_tokens, tokens_grid
from vlp.types import AttentionMass, Fused, Grid, Tokens


class JointPostFusion(nn.Module):
    """BERT's post-norm layers over the sequence [text; video]; sides are told apart by their content.

    Source: arXiv:2111.12681, 3.1; the layers are those of arXiv:1810.04805. With `dropout` in attention and outputs.
    """

    def __init__(
        self, *, dim: int, video_dim: int, text_dim: int, depth: int, num_heads: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.dim, self.video_dim, self.text_dim = dim, video_dim, text_dim
        self.updates_video = True
        self.text_proj, self.video_proj = match_width(text_dim, dim), match_width(video_dim, dim)
        self.blocks = nn.ModuleList(PostBlock(dim=dim, num_heads=num_heads, dropout=dropout) for _ in range(depth))

    def forward(self, video: Grid, text: Tokens, with_mass: bool = False) -> Fused | AttentionMass:
        """Fuse a grid of width D_video and text [B, L, D_text]; both come back with width D.

        `with_mass` asks for the mass of attention instead, which costs the attention matrices of one layer at a time.
        """
        cells = grid_tokens(video)
        x = torch.cat([self.text_proj(text.x), self.video_proj(cells.x)], dim=1)  # [B, M, D]
        mask = torch.cat([text.mask, cells.mask], dim=1)
        mass = x.new_zeros(x.shape[:2])
        for block in self.blocks:
            assert isinstance(block, PostBlock)
            if with_mass:
                mass = mass + attention_mass(block.attn, x, mask)
            x = block(x, mask)
        length = text.x.shape[1]
        if with_mass:
            return AttentionMass(mass[:, :length], tokens_grid(mass[:, length:, None], _like(video)))
        return Fused(Tokens(x[:, :length], text.mask), tokens_grid(x[:, length:], video))


class PostBlock(nn.Module):
    """A layer of BERT: attention, residual, norm; MLP, residual, norm."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = SelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = Mlp(dim=dim, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)
        init_linears(self)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map [B, M, D] to the same; mask [B, M] bool, True = real."""
        x = self.norm1(x + self.drop(self.attn(x, mask)))
        return self.norm2(x + self.mlp(x))


def attention_mass(attn: SelfAttention, x: Tensor, mask: Tensor) -> Tensor:
    """Return [B, M]: what real queries of x [B, M, D] give to each key, summed over queries, averaged over heads."""
    q, k, _ = rearrange(attn.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attn.num_heads).unbind(0)
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5  # [B, H, M, M]
    shares = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    return shares.mul(mask[:, None, :, None]).sum(2).mean(1).to(x.dtype)


def _like(video: Grid) -> Grid:
    """A grid of the same places, whose features have one number."""
    return Grid(video.x[..., :1], video.mask, video.prefix[..., :1])
