"""Contrast of paired embeddings by a softmax over all of them.

Axes: B clips of a rank, G clips of all ranks, D width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlp import dist
from vlp.objectives.pairs import Pairs, blocks, gradients, pairs_of, true_pairs
from vlp.types import Term


class Contrastive(nn.Module):
    """Softmax cross-entropy of each video against all texts, and of each text against all videos.

    Similarities are computed in blocks, and again in the backward pass: memory grows with the embeddings, not with
    their square.

    Args:
        sum_directions: add the two directions (Frozen in Time, All-in-One) instead of averaging them (CLIP).
        local_negatives: take negatives from this rank's clips only, as some papers do; the loss then depends on the
            number of ranks.
        whole_step: with trainer.accumulate > 1, take negatives from all micro-batches of the optimizer step, for one
            more forward pass of the encoders (vlp.training.whole_step); else from each micro-batch by itself.

    Source: arXiv:2103.00020, fig. 3; arXiv:1807.03748, eq. 4.
    """

    inputs: ClassVar = {"video": "video_embed", "text": "text_embed", "scale": "logit_scale", "valid": "valid"}

    def __init__(self, *, sum_directions: bool = False, local_negatives: bool = False, whole_step: bool = True) -> None:
        super().__init__()
        self.factor = 1.0 if sum_directions else 0.5
        self.local_negatives = local_negatives
        self.spans = ("video", "text", "valid") if whole_step else ()

    def count(self, valid: Tensor) -> Tensor:
        """Return the number of real clips of valid [B]."""
        return valid.sum()

    def forward(self, video: Tensor, text: Tensor, scale: Tensor, valid: Tensor) -> Term:
        """Return the sum over this rank's clips.

        Args:
            video, text: [B, D], unit length, row i of one paired with row i of the other.
            scale: scalar, 1 / temperature. valid: [B] bool; other rows are no positives and no negatives.
        """
        losses = _Losses.apply(video, text, scale, valid, self.local_negatives)
        return Term(self.factor * losses.sum(), self.count(valid))  # type: ignore[union-attr]


class _Losses(torch.autograd.Function):
    """Cross-entropy [B] of each of this rank's pairs, both directions added; 0 where masked.

    This rank's videos meet all texts. That gives the normaliser of each of its videos, and its share of the normaliser
    of every text, which is then added up over the ranks: videos are not sent to other ranks.
    """

    @staticmethod
    def forward(ctx: Any, video: Tensor, text: Tensor, scale: Tensor, valid: Tensor, local: bool) -> Tensor:
        ctx.local, ctx.first = local, 0 if local else dist.rank() * len(video)
        ctx.dtypes = video.dtype, text.dtype, scale.dtype
        with torch.autocast(video.device.type, enabled=False):  # half precision rounds logits of 50 by up to 0.1
            pairs = pairs_of(video, text, scale, valid, local)
            rows, columns = _log_sums(pairs)
            columns = columns if local else _log_add_over_ranks(columns)
            # Masked ones hold -inf; in the backward pass, exp(-inf - 0) is the 0 that is wanted there.
            rows, columns = (x.masked_fill(x == -torch.inf, 0.0) for x in (rows, columns))
            own = columns[ctx.first : ctx.first + len(video)]
            losses = rows + own - 2 * true_pairs(pairs, ctx.first)
        ctx.save_for_backward(rows, columns, *pairs)
        return losses.masked_fill_(~valid, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, *saved = ctx.saved_tensors
        pairs = Pairs(*saved)
        by_row = grads[0].float().masked_fill(~pairs.row_valid, 0.0)  # [B]
        by_column = by_row if ctx.local else dist.gather(by_row)  # [G]

        def slope(block: Tensor, i: slice, j: slice) -> Tensor:
            of_row = (block - rows[i, None]).exp_().mul_(by_row[i, None])
            return of_row.add_(block.sub_(columns[None, j]).exp_().mul_(by_column[None, j]))

        with torch.autocast(by_row.device.type, enabled=False):
            found = gradients(pairs, slope, -2 * by_row, first=ctx.first)
            of_text = found.columns if ctx.local else dist.sum_own_rows(found.columns)
        of = (found.rows, of_text, found.scale)
        return *(grad.to(dtype) for grad, dtype in zip(of, ctx.dtypes, strict=True)), None, None


def _log_sums(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the similarities over the columns, [B], and over this rank's rows, [G]; -inf where masked."""
    rows, columns = (torch.full((len(x),), -torch.inf, device=x.device) for x in (pairs.rows, pairs.columns))
    for i, j, block in blocks(pairs):
        rows[i] = torch.logaddexp(rows[i], block.logsumexp(1))
        columns[j] = torch.logaddexp(columns[j], block.logsumexp(0))
    return rows, columns


def _log_add_over_ranks(x: Tensor) -> Tensor:
    """Log of the sum over all ranks of exp(x), x [G]."""
    largest = dist.max_over_ranks(x)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    return largest + dist.sum_over_ranks((x - largest).exp()).log()
