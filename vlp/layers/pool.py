"""From many features to one vector a clip or text: [B, D].

Axes: B batch, T frames, H W cells, N tokens, P prefix tokens, D width.
A clip or text without anything real gives finite values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.layers.attention import CrossAttention
from vlp.layers.block import init_linears
from vlp.layers.grid import grid_tokens, prefix_mask
from vlp.types import Grid, Tokens


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, N, D] over the real of N, [B, D]; zeros where nothing is real."""
    weight = mask.to(x.dtype)
    return torch.einsum("bnd,bn->bd", x, weight / weight.sum(1, keepdim=True).clamp(min=1.0))


class MeanPool(nn.Module):
    """Mean of the real tokens, or of all cells of the real frames (class tokens are left out)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, features: Grid | Tokens) -> Tensor:
        """Map features of width D to [B, D]."""
        frames = features.x.mean((2, 3)) if isinstance(features, Grid) else features.x  # [B, T or N, D]
        return masked_mean(frames, features.mask)


class ClsPool(nn.Module):
    """The class token: the first token of a text, the prefix of a video; one a frame are averaged over real frames."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, features: Grid | Tokens) -> Tensor:
        """Map features of width D to [B, D].

        Raises:
            ValueError: the video encoder has no class token.
        """
        if isinstance(features, Tokens):
            return features.x[:, 0]
        num_prefix = features.prefix.shape[1]
        if num_prefix == 0:
            raise ValueError("ClsPool needs a class token, which this video encoder does not have; use MeanPool.")
        return features.prefix[:, 0] if num_prefix == 1 else masked_mean(features.prefix, prefix_mask(features))


class UnitFramePool(nn.Module):
    """The mean of the unit vectors of the frames' class tokens. Source: arXiv:2104.08860, mean pooling of its code."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, video: Grid) -> Tensor:
        """Map a grid with one class token a frame, prefix [B, T, D], to [B, D]."""
        return masked_mean(F.normalize(video.prefix, dim=-1), prefix_mask(video))


class ReluClsPool(nn.Module):
    """The first token of a text after a ReLU. Source: arXiv:2104.00650, its published code."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tokens: Tokens) -> Tensor:
        """Map [B, N, D] to [B, D]."""
        return tokens.x[:, 0].relu()


class LastPool(nn.Module):
    """The last real token of a text: what CLIP's text model, which is causal, reads."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tokens: Tokens) -> Tensor:
        """Map [B, N, D] to [B, D]."""
        place = torch.arange(tokens.mask.shape[1], device=tokens.mask.device)
        last = place.where(tokens.mask, 0).amax(1)  # [B]
        return tokens.x[torch.arange(len(last), device=last.device), last]


class AttentionPool(nn.Module):
    """A learned query that attends to all real features, class tokens included."""

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim=dim, context_dim=dim, num_heads=num_heads)
        nn.init.trunc_normal_(self.query, std=0.02, a=-0.04, b=0.04)
        init_linears(self)

    def forward(self, features: Grid | Tokens) -> Tensor:
        """Map features of width D to [B, D]."""
        tokens = grid_tokens(features) if isinstance(features, Grid) else features
        query = self.query.expand(tokens.x.shape[0], -1, -1)
        return self.attn(query, self.norm(tokens.x), tokens.mask)[:, 0]
