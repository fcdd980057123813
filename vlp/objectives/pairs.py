"""All pairs of two sets of embeddings, a block at a time: the whole matrix of similarities never exists.

    rows [B, D] of this rank      ->  block [b, g] of scaled similarities, made in the forward pass,
    columns [G, D] of all ranks       and made again in the backward pass

Contrast compares each row with each column, and each pair is needed once for both directions: this rank's rows against
all columns gives both the sums over the columns of its rows and its share of the sums over the rows of each column.

Axes: B rows of this rank, G columns of all ranks, D width, b g a block of them.

Source: the blocks of arXiv:2410.17243. One pass for both directions, the sums of columns added over ranks, is ours.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vlp import dist

BLOCK = 1024  # rows and columns of a block: 4 MiB of float32


class Pairs(NamedTuple):
    """Rows and columns whose scaled similarities are wanted; masked ones take part in nothing, whatever they hold."""

    rows: Tensor  # [B, D]
    columns: Tensor  # [G, D]
    scale: Tensor  # scalar, multiplies the similarities
    row_valid: Tensor  # [B] bool
    column_valid: Tensor  # [G] bool


def pairs_of(video: Tensor, text: Tensor, scale: Tensor, valid: Tensor, local: bool) -> Pairs:
    """Return this rank's videos [B, D] against the texts of all ranks, or of this one if `local`; valid [B]."""
    if local:
        return Pairs(video, text, scale.float(), valid, valid)
    return Pairs(video, dist.gather(text.detach()), scale.float(), valid, dist.gather(valid))


def blocks(pairs: Pairs) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the rows, the columns and the scaled similarities [b, g] float32 of each block; -inf where masked."""
    row_bias, column_bias = (_bias(mask) for mask in (pairs.row_valid, pairs.column_valid))
    for i in _slices(len(pairs.rows)):
        rows = clean(pairs.rows[i], pairs.row_valid[i]) * pairs.scale  # [b, D]
        for j in _slices(len(pairs.columns)):
            columns = clean(pairs.columns[j], pairs.column_valid[j])  # [g, D]
            block = row_bias[i, None] + column_bias[None, j]
            yield i, j, block.addmm_(rows, columns.T)  # the mask costs no pass of its own


class Gradients(NamedTuple):
    """Gradients of a sum over pairs."""

    rows: Tensor  # [B, D] float32
    columns: Tensor  # [G, D] float32, this rank's share
    scale: Tensor  # scalar, this rank's share


def gradients(pairs: Pairs, slope: Callable[[Tensor, slice, slice], Tensor], own: Tensor, *, first: int) -> Gradients:
    """Return the gradients of a sum over pairs, of which the true pairs are (row i, column first + i).

    Args:
        slope: (block [b, g], rows, columns) -> derivative of the sum by the block; it may overwrite the block.
        own: [B], what is added to the derivative by the similarity of each true pair; 0 where masked.
    """
    d_rows = torch.zeros(pairs.rows.shape, dtype=torch.float32, device=pairs.rows.device)
    d_columns = torch.zeros(pairs.columns.shape, dtype=torch.float32, device=pairs.rows.device)
    for i, j, block in blocks(pairs):
        d_block = slope(block, i, j)  # [b, g]
        d_rows[i].addmm_(d_block, clean(pairs.columns[j], pairs.column_valid[j]))
        d_columns[j].addmm_(d_block.T, clean(pairs.rows[i], pairs.row_valid[i]))
    d_scale = torch.zeros((), device=pairs.rows.device)
    for i in _slices(len(pairs.rows)):
        j = slice(first + i.start, first + i.stop)
        rows, columns = clean(pairs.rows[i], pairs.row_valid[i]), clean(pairs.columns[j], pairs.row_valid[i])
        d_rows[i].addcmul_(own[i, None], columns)
        d_columns[j].addcmul_(own[i, None], rows)
        d_scale += (d_rows[i] * rows).sum()  # d/d scale of scale * rows . columns, summed over the columns
    return Gradients(d_rows.mul_(pairs.scale), d_columns.mul_(pairs.scale), d_scale)


def true_pairs(pairs: Pairs, first: int) -> Tensor:
    """Return the scaled similarity [B] of row i with column first + i; 0 where masked."""
    parts = [
        (clean(pairs.rows[i], pairs.row_valid[i]) * clean(pairs.columns[j], pairs.row_valid[i])).sum(1)
        for i in _slices(len(pairs.rows))
        for j in [slice(first + i.start, first + i.stop)]
    ]
    return torch.cat(parts) * pairs.scale


def clean(x: Tensor, valid: Tensor) -> Tensor:
    """Return x [b, D] as float32, with zeros where masked: 0 * NaN in a sum would spoil the others."""
    return x.float().masked_fill(~valid[:, None], 0.0)


def _bias(mask: Tensor) -> Tensor:
    """Return what is added to a similarity: 0 where mask is True, else -inf."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))
