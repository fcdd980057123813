"""Predict what hidden patches look like, as numbers.

Axes: B clips, T frames, H W grid, D width, K hidden cells, E numbers of a target.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlp.layers.head import mlp_head
from vlp.types import Grid, Term


class MaskedRegression(nn.Module):
    """L1 distance to the targets of the hidden cells, the mean over a target's numbers.

    Args:
        dim: width of the grid. target: frozen module with `dim`, (frames uint8 [B, T, H, W, 3], frame_mask [B, T]) ->
            [B, T, H', W', E], such as those of vlp.encoders.targets.

    Source: arXiv:2209.01540, 3.2 and table 1 (pixels, HOG, features of image models).
    """

    inputs: ClassVar = {
        "grid": "fused_video:masked_patches",
        "hidden": "hidden:masked_patches",
        "frames": "frames",
        "frame_mask": "frame_mask",
        "valid": "valid",
    }

    def __init__(self, *, dim: int, target: nn.Module) -> None:
        super().__init__()
        self.target = target.requires_grad_(False).train(False)
        self.head = mlp_head(dim, target.dim, hidden_dim=2 * dim)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "MaskedRegression":
        """Set training mode, except for the target."""
        super().train(mode)
        self.target.eval()
        return self

    def count(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Return the number of hidden cells [B, T, H, W] of real clips [B]."""
        return (hidden & valid[:, None, None, None]).sum()

    def forward(self, grid: Grid, hidden: Tensor, frames: Tensor, frame_mask: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's hidden cells.

        Raises:
            ValueError: the target's grid differs from the encoder's.
        """
        target = self.target(frames, frame_mask)  # [B, T, H, W, E]
        if target.shape[:4] != grid.x.shape[:4]:
            raise ValueError(
                f"the target has a grid of {tuple(target.shape[1:4])}, the encoder one of {tuple(grid.x.shape[1:4])}; "
                "give the target the encoder's patch_size."
            )
        keep = hidden & valid[:, None, None, None]
        predicted = self.head(grid.x[keep]).float()  # [K, E]
        distance = F.l1_loss(predicted, target[keep].float(), reduction="none").mean(1)
        return Term(distance.sum(), self.count(hidden, valid))
