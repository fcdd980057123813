"""Which of several texts belongs to the video?

Axes: B clips, K pairs of a clip (the true one first), L text length, D width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from vlp.layers.head import mlp_head
from vlp.types import Term, Tokens


class ChoiceMatching(nn.Module):
    """Softmax over the true pair and pairs with other texts, from the first text token.

    Args:
        dim: width of the tokens. temperature: divides the logits. dropout: before the head.

    Source: arXiv:2111.12681, eq. 3; one true text and three others in the published code.
    """

    inputs: ClassVar = {
        "positive": "fused_text",
        "negatives": ["fused_text:wrong_text", "fused_text:wrong_text_2", "fused_text:wrong_text_3"],
        "found": ["has_wrong_text:wrong_text", "has_wrong_text:wrong_text_2", "has_wrong_text:wrong_text_3"],
        "valid": "valid",
    }

    def __init__(self, *, dim: int, temperature: float = 0.05, dropout: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0.")
        self.temperature = temperature
        self.head = mlp_head(dim, 1, hidden_dim=2 * dim, dropout=dropout)

    def count(self, valid: Tensor, found: list[Tensor]) -> Tensor:
        """Return the number of real clips with at least one other text to choose from."""
        return (valid & torch.stack(found).any(0)).sum()

    def forward(self, positive: Tokens, negatives: list[Tokens], found: list[Tensor], valid: Tensor) -> Term:
        """Return the sum over this rank's clips.

        Args:
            positive: fused tokens [B, L, D] of the true pair. negatives: the same with other texts.
            found: [B] bool each, False where there was no other text. valid: [B] bool.

        Raises:
            ValueError: not one `found` for each of the `negatives`.
        """
        if len(negatives) != len(found):
            raise ValueError(
                f"inputs.negatives names {len(negatives)} nodes and inputs.found {len(found)}; name one for each."
            )
        counted = valid & torch.stack(found).any(0)  # [B]
        keep = torch.stack([counted, *(counted & each for each in found)], dim=1)  # [B, K]
        firsts = torch.stack([tokens.x[:, 0] for tokens in (positive, *negatives)], dim=1)  # [B, K, D]
        logits = self.head(firsts.masked_fill(~keep[..., None], 0.0)).squeeze(-1).float() / self.temperature
        losses = logits.masked_fill(~keep, -torch.inf).logsumexp(1) - logits[:, 0]  # inf in rows that do not count
        return Term(torch.where(counted, losses, 0.0).sum(), counted.sum())

    def score(self, tokens: Tokens) -> Tensor:
        """Return the logit [B] that fused tokens [B, L, D] belong together."""
        return self.head(tokens.x[:, 0]).squeeze(-1) / self.temperature
