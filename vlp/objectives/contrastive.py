"""Contrast of paired embeddings.

Axes: B clips of a rank, G clips of all ranks, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import dist
from vlp.types import Term


class Contrastive(nn.Module):
    """Softmax cross-entropy of each video against all texts, and of each text against all videos.

    Args:
        sum_directions: add the two directions (Frozen in Time, All-in-One) instead of averaging them (CLIP).
        local_negatives: take negatives from this rank's clips only, as some papers do; the loss then depends on the
            number of ranks.

    Source: arXiv:2103.00020, fig. 3; arXiv:1807.03748, eq. 4.
    """

    inputs: ClassVar = {"video": "video_embed", "text": "text_embed", "scale": "logit_scale", "valid": "valid"}

    def __init__(self, *, sum_directions: bool = False, local_negatives: bool = False) -> None:
        super().__init__()
        self.factor = 1.0 if sum_directions else 0.5
        self.local_negatives = local_negatives

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips of valid [B]."""
        return valid.sum()

    def forward(self, video: Tensor, text: Tensor, scale: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's clips.

        Args:
            video, text: [B, D], unit length, row i of one paired with row i of the other.
            scale: scalar, 1 / temperature. valid: [B] bool; other rows are no positives and no negatives.
        """
        everyone = (lambda x: x) if self.local_negatives else dist.gather
        first = 0 if self.local_negatives else dist.rank() * len(video)
        video, text = (_zero_invalid(x.float(), valid) for x in (video, text))
        allowed = everyone(valid)  # [G]
        targets = first + torch.arange(len(video), device=video.device)  # [B]
        total = video.new_zeros(())
        with torch.autocast(video.device.type, enabled=False):  # half precision rounds logits of 50 by up to 0.1
            for rows, columns in ((video, everyone(text)), (text, everyone(video))):
                logits = (scale * rows @ columns.T).masked_fill(~allowed, -torch.inf)  # [B, G]
                losses = F.cross_entropy(logits, targets, reduction="none")  # inf or NaN in rows of masked slots
                total = total + torch.where(valid, losses, 0.0).sum()
        return Term(self.factor * total, self.count(valid))


def _zero_invalid(x: Tensor, valid: Tensor) -> Tensor:
    """Zero the rows of masked slots: 0 * NaN in the backward pass would spoil the others."""
    return x.masked_fill(~valid[:, None], 0.0)
