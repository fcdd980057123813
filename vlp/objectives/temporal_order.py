"""Is the clip told from the same frames in another order?

Axes: B clips, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.types import Term


class TemporalOrder(nn.Module):
    """Softmax of a caption over its clip and the clip with its frames in another order, by cosine.

    Negatives from other clips rarely differ in time alone, so contrast by itself is nearly blind to it. A clip in which
    nothing happens adds log 2 and no direction.

    Source: the time-order contrast of arXiv:2301.02074, 4.1. Deviation: the order of the frames of one clip is changed,
    where the paper stitches two clips together and also swaps the text.
    """

    inputs: ClassVar = {
        "video": "video_embed",
        "reordered": "video_embed:reversed_frames",
        "text": "text_embed",
        "scale": "logit_scale",
        "valid": "valid",
    }

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips of valid [B]."""
        return valid.sum()

    def forward(self, video: Tensor, reordered: Tensor, text: Tensor, scale: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's clips.

        Args:
            video, reordered, text: [B, D], unit length, row by row of the same clip.
            scale: scalar, 1 / temperature. valid: [B] bool.
        """
        video, reordered, text = (x.float().masked_fill(~valid[:, None], 0.0) for x in (video, reordered, text))
        margin = scale * ((video - reordered) * text).sum(1)  # [B]; a softmax over two is a sigmoid of the difference
        return Term(torch.where(valid, F.softplus(-margin), 0.0).sum(), self.count(valid))
