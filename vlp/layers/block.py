"""The transformer block, and what is done to blocks from outside: finding them and checkpointing their activations.

Axes: B batch, N tokens, D width.
"""

import re
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlp.layers.attention import CrossAttention, SelfAttention

# Names under which vlp, timm and Hugging Face keep their repeated layers (timm's ResNet: layer1..layer4).
_BLOCK_LISTS = re.compile(r"blocks?|layers?\d?|stages")


class DropPath(nn.Module):
    """Zero the residual branch of a whole sample with probability `prob`, in training. Source: arXiv:1603.09382."""

    def __init__(self, *, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, ...] to [B, ...]."""
        if not self.training or self.prob == 0.0:
            return x
        keep = 1.0 - self.prob
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, *, dim: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        return self.drop(self.fc2(self.act(self.fc1(x))))


class CrossBranch(nn.Module):
    """The residual branch of a block that reads a context: norm, then cross attention."""

    def __init__(self, *, dim: int, context_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim=dim, context_dim=context_dim, num_heads=num_heads, dropout=dropout)

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """Map [B, N, D] to [B, N, D] by the context [B, M, D_context]."""
        assert context is not None, "a block built with cross_dim needs a context"
        return self.attn(self.norm(x), context, context_mask)


class Block(nn.Module):
    """Pre-norm transformer block: self attention, cross attention where `cross_dim` is given, MLP."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        cross_dim: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim=dim, num_heads=num_heads, dropout=dropout, causal=causal)
        self.cross = (
            CrossBranch(dim=dim, context_dim=cross_dim, num_heads=num_heads, dropout=dropout) if cross_dim else None
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim, mlp_ratio=mlp_ratio, dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.drop_path = DropPath(prob=drop_path)
        init_linears(self)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Map [B, N, D] to [B, N, D]; `mask` [B, N] and `context_mask` [B, M] bool, True = real."""
        x = x + self.drop_path(self.drop(self.attn(self.norm1(x), mask)))
        if self.cross is not None:
            x = x + self.drop_path(self.drop(self.cross(x, context, context_mask)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_linears(module: nn.Module) -> None:
    """Initialise every linear layer and embedding inside as BERT does: weights N(0, 0.02) cut at 2, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def match_width(source_dim: int, dim: int) -> nn.Module:
    """Return a linear layer from `source_dim` to `dim`, or nothing where they are equal."""
    if source_dim == dim:
        return nn.Identity()
    linear = nn.Linear(source_dim, dim)
    init_linears(linear)
    return linear


def drop_path_rates(drop_path: float, depth: int) -> list[float]:
    """Return the drop-path probability of each block: from 0 to `drop_path`, linear in depth."""
    return [drop_path * i / max(depth - 1, 1) for i in range(depth)]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the repeated layers inside a vlp, timm or Hugging Face module, in order.

    They are the units of activation checkpointing and of compilation: `for block in blocks_of(model): block.compile()`.
    """
    found: list[nn.Module] = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and _BLOCK_LISTS.fullmatch(name):
            for unit in child:  # a stage of a hierarchical model holds blocks itself
                found += blocks_of(unit) or [unit]
        else:
            found += blocks_of(child)
    return found


def checkpoint_blocks(module: nn.Module) -> int:
    """Recompute the activations of every block of `module` in the backward pass; returns the number of blocks.

    Only `forward` of each block is replaced: hooks, parameter names and `compile` see the same module as before.
    """
    blocks = blocks_of(module)
    for block in blocks:
        block.forward = partial(_recompute, block.forward)
    return len(blocks)


def _recompute(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
