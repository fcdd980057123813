"""Does this text belong to this video?

Axes: B clips, L text length, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.types import Term, Tokens


class Matching(nn.Module):
    """Binary classification of fused pairs, from the first text token: the true pair, and pairs with one side swapped.

    Which clips are swapped in is the choice of the views `wrong_text` and `wrong_video` (hard or random).

    Source: arXiv:2107.07651, eq. 5.
    """

    inputs: ClassVar = {
        "positive": "fused_text",
        "negatives": ["fused_text:wrong_text", "fused_text:wrong_video"],
        "found": ["has_wrong_text:wrong_text", "has_wrong_video:wrong_video"],
        "valid": "valid",
    }

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, 1)

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips of valid [B]; each stands for its positive and its negatives together."""
        return valid.sum()

    def forward(self, positive: Tokens, negatives: list[Tokens], found: list[Tensor], valid: Tensor) -> Term:
        """Return the sum over this rank's clips of the mean over their pairs.

        Args:
            positive: fused tokens [B, L, D] of the true pair. negatives: the same for each kind of swap.
            found: [B] bool each, False where there was no other clip to swap in. valid: [B] bool.

        Raises:
            ValueError: not one `found` for each of the `negatives`.
        """
        if len(negatives) != len(found):
            raise ValueError(
                f"inputs.negatives names {len(negatives)} nodes and inputs.found {len(found)}; name one for each."
            )
        keep = torch.stack([valid, *(valid & each for each in found)])  # [1 + kinds, B]
        firsts = torch.stack([tokens.x[:, 0] for tokens in (positive, *negatives)])  # [1 + kinds, B, D]
        firsts = firsts.masked_fill(~keep[..., None], 0.0)  # 0 * NaN in the backward pass would spoil the head
        logits = self.head(firsts).squeeze(-1).float()  # [1 + kinds, B]
        labels = torch.zeros_like(logits)
        labels[0] = 1.0
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        per_clip = torch.where(keep, losses, 0.0).sum(0) / keep.sum(0).clamp(min=1)  # [B]
        return Term(per_clip.sum(), self.count(valid))

    def score(self, tokens: Tokens) -> Tensor:
        """Return the logit [B] that fused tokens [B, L, D] belong together."""
        return self.head(tokens.x[:, 0]).squeeze(-1)
