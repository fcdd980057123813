"""Predict the masked words of a caption.

Axes: B clips, L text length, D width, K masked tokens, V vocabulary.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlp.types import IGNORE_INDEX, Term, Tokens


class MaskedWords(nn.Module):
    """Cross-entropy of the masked tokens, which see the video through the fusion.

    Source: arXiv:1810.04805, 3.1.
    """

    inputs: ClassVar = {"tokens": "fused_text:masked_words", "labels": "labels:masked_words"}

    def __init__(self, *, dim: int, vocab_size: int) -> None:
        super().__init__()
        norm = nn.LayerNorm(dim, eps=1e-12)  # as BERT's
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), norm, nn.Linear(dim, vocab_size))

    def count(self, labels: Tensor) -> Tensor:
        """Return the number of masked tokens of labels [B, L]."""
        return (labels != IGNORE_INDEX).sum()

    def forward(self, tokens: Tokens, labels: Tensor) -> Term:
        """Return the sum over this rank's masked tokens; labels [B, L] int64, IGNORE_INDEX where unmasked."""
        keep = labels != IGNORE_INDEX  # [B, L]
        logits = self.head(tokens.x[keep])  # [K, V]: only masked positions are projected to the vocabulary
        return Term(F.cross_entropy(logits.float(), labels[keep], reduction="sum"), self.count(labels))

    def score(self, tokens: Tokens) -> Tensor:
        """Return the logits [B, L, V] of the words at every place of fused tokens [B, L, D]."""
        return self.head(tokens.x)
