"""Answer a question about a video from a fixed list.

Axes: B clips, L text length, D width, A answers, K asked clips.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlp.types import IGNORE_INDEX, Term, Tokens


class AnswerClasses(nn.Module):
    """Cross-entropy of the answer, from the first fused token of the question.

    Args:
        dim: width of the fusion. num_answers: length of the list, as in `texts`.
        label_smoothing: share of the target spread over the answers.

    Source: arXiv:2206.03428, 3.3 (answers as classes), there with a BERT-like head as here.
    """

    inputs: ClassVar = {"tokens": "fused_text", "label": "label", "valid": "valid"}

    def __init__(self, *, dim: int, num_answers: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.head = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.LayerNorm(2 * dim), nn.Linear(2 * dim, num_answers)
        )

    def count(self, label: Tensor, valid: Tensor) -> Tensor:
        """Return the number of clips [B] with an answer of the list."""
        return ((label != IGNORE_INDEX) & valid).sum()

    def forward(self, tokens: Tokens, label: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's questions; label [B] int64, IGNORE_INDEX where nothing is asked."""
        asked = (label != IGNORE_INDEX) & valid
        logits = self.head(tokens.x[asked, 0]).float()  # [K, A]
        loss = F.cross_entropy(logits, label[asked], label_smoothing=self.label_smoothing, reduction="sum")
        return Term(loss, self.count(label, valid))

    def score(self, tokens: Tokens) -> Tensor:
        """Return the logits [B, A] of the answers to the questions that were fused into tokens [B, L, D]."""
        return self.head(tokens.x[:, 0])
