"""Predict the visual code of hidden patches.

Axes: B clips, T H W grid, D width, K hidden cells, V codes.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlp.layers.head import mlp_head
from vlp.types import Grid, Term


class MaskedVisual(nn.Module):
    """Cross-entropy of the codes that a frozen visual tokenizer gives to the hidden cells of the encoder's grid.

    Args:
        dim: width of the grid. num_codes: size of the tokenizer's vocabulary.
        hidden_dim: of a head with two layers, as published with the paper below; null is a norm and one layer.
        tokenizer: (frames uint8 [B, T, H, W, 3], frame_mask [B, T] bool) -> codes int64 [B, T', H', W'].

    Source: arXiv:2111.12681, eq. 5 (there with the codes of a discrete VAE).
    """

    inputs: ClassVar = {
        "grid": "fused_video:masked_patches",
        "hidden": "hidden:masked_patches",
        "frames": "frames",
        "frame_mask": "frame_mask",
        "valid": "valid",
    }

    def __init__(self, *, dim: int, num_codes: int, tokenizer: nn.Module, hidden_dim: int | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False).train(False)
        plain = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_codes))
        self.head = plain if hidden_dim is None else mlp_head(dim, num_codes, hidden_dim=hidden_dim)

    def train(self, mode: bool = True) -> "MaskedVisual":
        """Set training mode, except for the tokenizer: the targets of a clip are the same in every step."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def count(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Return the number of hidden cells [B, T, H, W] of real clips [B]."""
        return (hidden & valid[:, None, None, None]).sum()

    def forward(self, grid: Grid, hidden: Tensor, frames: Tensor, frame_mask: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's hidden cells.

        Raises:
            ValueError: the tokenizer's grid differs from the encoder's.
        """
        codes = self.tokenizer(frames, frame_mask)  # [B, T, H, W]
        if codes.shape != grid.x.shape[:4]:
            raise ValueError(
                f"the visual tokenizer gives a grid of {tuple(codes.shape[1:])}, the encoder one of "
                f"{tuple(grid.x.shape[1:4])}; set both to the same patch_size and tubelet_size."
            )
        keep = hidden & valid[:, None, None, None]
        logits = self.head(grid.x[keep])  # [K, V]
        return Term(F.cross_entropy(logits.float(), codes[keep], reduction="sum"), self.count(hidden, valid))
