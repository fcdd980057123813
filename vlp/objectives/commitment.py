"""Keep vectors and their codes together.

Axes: B clips, T frames, H W grid, E width of a code.
"""

from typing import ClassVar

from torch import Tensor, nn

from vlp.layers.quantize import Quantized
from vlp.types import Term


class Commitment(nn.Module):
    """Squared distance of each cell to its code, once with the code still and once with the cell still.

    Args:
        pull: weight of the part that moves the cells; the part that moves the codes weighs 1.

    Source: arXiv:1711.00937, eq. 3.
    """

    inputs: ClassVar = {"quantized": "quantized", "frame_mask": "encoded_mask", "valid": "valid"}

    def __init__(self, *, pull: float = 0.25) -> None:
        super().__init__()
        self.pull = pull

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips [B]."""
        return valid.sum()

    def forward(self, quantized: Quantized, frame_mask: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's clips of the mean over their cells in real frames [B, T]."""
        near, chosen = quantized.near, quantized.chosen  # [B, T, H, W, E]
        moved = (chosen - near.detach()).square().sum(-1) + self.pull * (near - chosen.detach()).square().sum(-1)
        frames = moved.mean((2, 3)) * frame_mask  # [B, T]
        per_clip = frames.sum(1) / frame_mask.sum(1).clamp(min=1)
        return Term((per_clip * valid).sum(), self.count(valid))
