"""Contrast of a video with all of its texts.

Axes: B clips of a rank, G clips of all ranks, M texts of a clip (the first one and the others), E embedding.
"""

from typing import ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from vlp import dist
from vlp.types import Term


class Balance(Protocol):
    """How much the texts' side weighs."""

    def __call__(self, by_video: Tensor, by_text: Tensor) -> Tensor:
        """Take the mean losses of both sides, scalars without gradient."""
        ...


class Fixed:
    """The texts' side weighs `weight`."""

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, by_video: Tensor, by_text: Tensor) -> Tensor:
        return torch.full_like(by_text, self.weight)


class Equalised:
    """Both sides weigh the same: the texts' side times the ratio of the losses. Source: arXiv:2408.07249, 3.4."""

    def __call__(self, by_video: Tensor, by_text: Tensor) -> Tensor:
        return by_video / by_text.clamp(min=1e-6)


class MultiPositive(nn.Module):
    """Softmax of each video over all texts, averaged over its own, plus softmax of each text over all videos.

    With one text a video it is the sum of the two directions of `Contrastive`.

    Args:
        balance: Fixed or Equalised, of the texts' side.
        spare_positives: leave a video's other texts out of the denominator of each of its texts ("unbalanced").

    Source: arXiv:2408.07249, 3.4, eq. 5 to 8. Deviation: the mean over texts is one of a micro-batch.
    """

    inputs: ClassVar = {
        "video": "video_embed",
        "texts": "texts_embed",
        "text_there": "text_there",
        "scale": "logit_scale",
        "valid": "valid",
    }

    def __init__(self, *, balance: Balance, spare_positives: bool = False) -> None:
        super().__init__()
        self.balance, self.spare_positives = balance, spare_positives

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips of valid [B]."""
        return valid.sum()

    def forward(self, video: Tensor, texts: Tensor, text_there: Tensor, scale: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's clips.

        Args:
            video: [B, E]. texts: [B, M, E] under text_there [B, M] bool; unit vectors.
            scale: scalar, 1 / temperature. valid: [B] bool.
        """
        there = text_there & valid[:, None]
        video = video.float().masked_fill(~valid[:, None], 0.0)  # 0 * NaN in the backward pass would spoil the others
        texts = texts.float().masked_fill(~there[..., None], 0.0)
        with torch.autocast(video.device.type, enabled=False):  # half precision rounds logits of 50 by up to 0.1
            by_video = self._of_videos(video, texts, there, scale)  # [B]
            by_text = self._of_texts(video, texts, there, valid, scale)  # [B, M]
        num_videos = dist.sum_over_ranks(valid.sum().float()).clamp(min=1)
        num_texts = dist.sum_over_ranks(there.sum().float()).clamp(min=1)
        of_videos, of_texts = by_video.sum(), by_text.sum() * num_videos / num_texts
        both = dist.sum_over_ranks(torch.stack([of_videos, of_texts])) / num_videos
        return Term(of_videos + self.balance(both[0], both[1]) * of_texts, self.count(valid))

    def _of_videos(self, video: Tensor, texts: Tensor, there: Tensor, scale: Tensor) -> Tensor:
        """Return -log softmax of each video over all texts, averaged over its own, [B]; 0 where it has none."""
        everything, real = dist.gather(texts), dist.gather(there)  # [G, M, E], [G, M]
        logits = scale * torch.einsum("be,gme->bgm", video, everything)
        rows = torch.arange(len(video), device=video.device)
        own = logits[rows, dist.rank() * len(video) + rows]  # [B, M]
        logits = logits.masked_fill(~real, -torch.inf)
        total = rearrange(logits, "b g m -> b (g m)").logsumexp(1, keepdim=True)  # [B, 1]
        if self.spare_positives:
            others = logits.clone()
            others[rows, dist.rank() * len(video) + rows] = -torch.inf
            total = torch.logaddexp(rearrange(others, "b g m -> b (g m)").logsumexp(1, keepdim=True), own)
        losses = torch.where(there, total - own, 0.0)
        return losses.sum(1) / there.sum(1).clamp(min=1)

    def _of_texts(self, video: Tensor, texts: Tensor, there: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
        """Return -log softmax of each text over all videos, [B, M]; 0 where there is no text."""
        everything, real = dist.gather(video), dist.gather(valid)  # [G, E], [G]
        logits = (scale * torch.einsum("bme,ge->bmg", texts, everything)).masked_fill(~real, -torch.inf)
        rows = torch.arange(len(video), device=video.device)
        own = logits[rows, :, dist.rank() * len(video) + rows]  # [B, M]
        return torch.where(there, logits.logsumexp(2) - own, 0.0)
