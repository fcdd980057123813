"""Words and patches of a pair should be near each other: the cost of moving one set onto the other.

Axes: B clips, L text length, N words, S patches of all frames, T frames, H W grid cells, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vlp.types import Grid, Term, Tokens


class WordPatch(nn.Module):
    """Distance by optimal transport between the words and the patches of true pairs, less that of swapped pairs.

    The cost of moving a word onto a patch is one minus their cosine; class and special tokens take no part.

    Args:
        beta: how even the plan of moves is; smaller is closer to the cheapest. num_steps: of the proximal iteration.

    Source: arXiv:2102.03334, 3.2 (word patch alignment), with the iteration of arXiv:1802.04307, algorithm 2.
    """

    inputs: ClassVar = {
        "text": "fused_text",
        "video": "fused_video",
        "word_ids": "word_ids",
        "wrong_text": "fused_text:wrong_text",
        "wrong_video": "fused_video:wrong_text",
        "wrong_word_ids": "word_ids:wrong_text",
        "found": "has_wrong_text:wrong_text",
        "valid": "valid",
    }

    def __init__(self, *, beta: float = 0.5, num_steps: int = 50) -> None:
        super().__init__()
        if beta <= 0 or num_steps < 1:
            raise ValueError(f"beta={beta} must be above 0 and num_steps={num_steps} at least 1.")
        self.beta, self.num_steps = beta, num_steps

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips of valid [B]; each stands for its true and its swapped pair together."""
        return valid.sum()

    def forward(
        self,
        text: Tokens,
        video: Grid,
        word_ids: Tensor,
        wrong_text: Tokens,
        wrong_video: Grid,
        wrong_word_ids: Tensor,
        found: Tensor,
        valid: Tensor,
    ) -> Term:
        """Return the sum over real clips of the true distance less the swapped one, halved as their mean.

        Args:
            text, video: fused tokens [B, L, D] and grid [B, T, H, W, D]; word_ids [B, L], -1 for what is no word.
            wrong_text, wrong_video, wrong_word_ids: of the pair with another clip's text; found [B] bool, is there one?
        """
        true = self.distance(text, video, word_ids, valid)
        wrong = self.distance(wrong_text, wrong_video, wrong_word_ids, valid & found)
        return Term((true - wrong).sum() / 2, self.count(valid))

    def distance(self, text: Tokens, video: Grid, word_ids: Tensor, keep: Tensor) -> Tensor:
        """Return the distance [B] of each pair, zero where `keep` [B] is False or there is no word."""
        words = (word_ids >= 0) & text.mask & keep[:, None]  # [B, L]
        cells = rearrange(video.x, "b t h w d -> b (t h w) d")
        there = repeat(video.mask, "b t -> b (t s)", s=video.x.shape[2] * video.x.shape[3]) & keep[:, None]  # [B, S]
        # Zeros first: 0 * NaN in the backward pass would spoil what is real.
        x, y = (
            F.normalize(each.float().masked_fill(~real[..., None], 0.0), dim=-1, eps=1e-5)
            for each, real in ((text.x, words), (cells, there))
        )
        both = words[:, :, None] & there[:, None]
        with torch.autocast(text.x.device.type, enabled=False):  # the plan's shares underflow in half precision
            cost = torch.where(both, 1 - torch.einsum("bld,bsd->bls", x, y), 0.0)  # [B, L, S]
            plan = transport(cost.detach(), words, there, beta=self.beta, num_steps=self.num_steps)
            return (cost * plan).sum((1, 2))


@torch.no_grad()
def transport(cost: Tensor, rows: Tensor, columns: Tensor, *, beta: float, num_steps: int) -> Tensor:
    """Return a plan [B, L, S] that moves equal masses on the real rows [B, L] to equal masses on the columns [B, S].

    Each real row gives 1 / (number of rows), each column gets 1 / (number of columns). Rows or columns that are not
    real have nothing; where there are none of a kind the plan is zero. Source: arXiv:1802.04307, algorithm 2.
    """
    both = (rows[:, :, None] & columns[:, None]).float()
    kernel = torch.exp(-cost / beta) * both
    plan = both
    give, get = (each / each.sum(1, keepdim=True).clamp(min=1) for each in (rows.float(), columns.float()))
    left = give  # [B, L]
    for _ in range(num_steps):
        weight = kernel * plan
        right = get / torch.einsum("bls,bl->bs", weight, left).clamp(min=1e-30)
        left = give / torch.einsum("bls,bs->bl", weight, right).clamp(min=1e-30)
        plan = left[:, :, None] * weight * right[:, None]
    return plan
