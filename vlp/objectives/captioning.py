"""Write the caption of a video, word after word.

Axes: B clips, L text length, K predicted tokens, V vocabulary.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlp.types import Term


class Captioning(nn.Module):
    """Cross-entropy of the next token under teacher forcing.

    Args:
        label_smoothing: share of the target spread over the vocabulary.

    Source: arXiv:2205.01917, eq. 3.
    """

    inputs: ClassVar = {"logits": "caption_logits", "text_ids": "text_ids", "text_mask": "text_mask", "valid": "valid"}

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} is not a share; it must be at least 0 and below 1.")
        self.label_smoothing = label_smoothing

    def count(self, text_mask: Tensor, valid: Tensor) -> Tensor:
        """Return the number of predicted tokens: every real one but the first of text_mask [B, L]."""
        return (text_mask[:, 1:] & valid[:, None]).sum()

    def forward(self, logits: Tensor, text_ids: Tensor, text_mask: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's tokens; logits [B, L, V] at position i predict token i + 1."""
        keep = text_mask[:, 1:] & valid[:, None]  # [B, L - 1]
        loss = F.cross_entropy(
            logits[:, :-1][keep].float(),  # [K, V]: padding would cost memory, and its NaNs the gradient
            text_ids[:, 1:][keep],
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return Term(loss, self.count(text_mask, valid))
