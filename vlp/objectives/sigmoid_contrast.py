"""Contrast of paired embeddings by a sigmoid for each pair.

Axes: B clips of a rank, G clips of all ranks, D width.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlp import dist
from vlp.objectives.pairs import Pairs, blocks, gradients, pairs_of, true_pairs
from vlp.types import Term


class SigmoidContrast(nn.Module):
    """Binary cross-entropy of each video with each text: do they belong together? Computed in blocks.

    The bias starts low, because nearly all pairs do not. The paper's temperature starts at 0.1: model.temperature.init.

    Args:
        init_bias: what is added to the scaled similarities at the start; learnt.
        local_negatives: pairs of this rank's clips only; the loss then depends on the number of ranks.
        whole_step: with trainer.accumulate > 1, pairs of all micro-batches of the step (see Contrastive).

    Source: arXiv:2303.15343, alg. 1.
    """

    inputs: ClassVar = {"video": "video_embed", "text": "text_embed", "scale": "logit_scale", "valid": "valid"}

    def __init__(self, *, init_bias: float = -10.0, local_negatives: bool = False, whole_step: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(init_bias))
        self.local_negatives = local_negatives
        self.spans = ("video", "text", "valid") if whole_step else ()

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips of valid [B]."""
        return valid.sum()

    def forward(self, video: Tensor, text: Tensor, scale: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's videos and all texts.

        Args:
            video, text: [B, D], unit length, row i of one paired with row i of the other.
            scale: scalar, 1 / temperature. valid: [B] bool; other rows are in no pair.
        """
        losses = _Losses.apply(video, text, scale, self.bias, valid, self.local_negatives)
        return Term(losses.sum(), self.count(valid))  # type: ignore[union-attr]


class _Losses(torch.autograd.Function):
    """Sum over all texts of the cross-entropy of each of this rank's videos, [B]; 0 where masked."""

    @staticmethod
    def forward(ctx: Any, video: Tensor, text: Tensor, scale: Tensor, bias: Tensor, valid: Tensor, local: bool) -> Any:
        ctx.local, ctx.first = local, 0 if local else dist.rank() * len(video)
        ctx.dtypes = video.dtype, text.dtype, scale.dtype, bias.dtype
        with torch.autocast(video.device.type, enabled=False):
            pairs = pairs_of(video, text, scale, valid, local)
            losses = -(true_pairs(pairs, ctx.first) + bias)  # softplus(-x) = softplus(x) - x
            for i, _, block in blocks(pairs):
                losses[i] += F.softplus(block.add_(bias)).sum(1)
        ctx.save_for_backward(bias, *pairs)
        return losses.masked_fill_(~valid, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bias, *saved = ctx.saved_tensors
        pairs = Pairs(*saved)
        by_row = grads[0].float().masked_fill(~pairs.row_valid, 0.0)  # [B]
        of_bias = -by_row.sum()

        def slope(block: Tensor, i: slice, j: slice) -> Tensor:
            nonlocal of_bias
            block.add_(bias).sigmoid_().mul_(by_row[i, None])
            of_bias = of_bias + block.sum()
            return block

        with torch.autocast(by_row.device.type, enabled=False):
            found = gradients(pairs, slope, -by_row, first=ctx.first)
            of_text = found.columns if ctx.local else dist.sum_own_rows(found.columns)
        of = (found.rows, of_text, found.scale, of_bias)
        return *(grad.to(dtype) for grad, dtype in zip(of, ctx.dtypes, strict=True)), None, None
