"""Choose the right one of several texts about a video.

Axes: B clips, K options, D width, N asked clips.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.types import IGNORE_INDEX, Term, Tokens


class MultipleChoice(nn.Module):
    """Cross-entropy over the options of a question, each scored from its first fused token by one shared head.

    Source: arXiv:2111.12681, 4.2 (multiple-choice questions).
    """

    inputs: ClassVar = {"options": "fused_more", "label": "label", "valid": "valid"}

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, 1)

    def count(self, label: Tensor, valid: Tensor) -> Tensor:
        """Return the number of clips [B] that are asked."""
        return ((label != IGNORE_INDEX) & valid).sum()

    def forward(self, options: Tokens, label: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's questions.

        Args:
            options: first fused tokens [B, K, D], mask False where there is no such option.
            label: [B] int64, the place of the right one, IGNORE_INDEX where nothing is asked. valid: [B] bool.
        """
        asked = (label != IGNORE_INDEX) & valid
        logits = self.head(options.x[asked]).squeeze(-1).float()  # [N, K]
        logits = logits.masked_fill(~options.mask[asked], -torch.inf)
        return Term(F.cross_entropy(logits, label[asked], reduction="sum"), self.count(label, valid))

    def score(self, tokens: Tokens) -> Tensor:
        """Return the logit [B] of the option that was fused into tokens [B, L, D]."""
        return self.head(tokens.x[:, 0]).squeeze(-1)
