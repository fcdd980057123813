"""From the terms of the objectives to one scalar loss."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vlp import dist
from vlp.types import Term


class Combined(NamedTuple):
    """The loss to differentiate on this rank, and what to log."""

    loss: Tensor  # scalar; its gradients, averaged over the ranks, are those of the global loss
    means: dict[str, Tensor]  # this rank's share of each unweighted mean; sums over ranks and micro-batches to the mean


def combine(terms: Mapping[str, Term], weights: Mapping[str, float], counts: Mapping[str, Tensor]) -> Combined:
    """Divide each sum once by its global count and add them up by weight.

    Args:
        terms: what the objectives returned for one micro-batch on this rank.
        weights: the factor of each objective.
        counts: number of items of each objective in the whole step: all ranks, all micro-batches (see `global_counts`).

    The loss is multiplied by the number of ranks because data parallelism averages gradients over them.
    """
    means = {name: term.total.float() / counts[name].clamp(min=1) for name, term in terms.items()}
    loss = sum((weights[name] * mean for name, mean in means.items()), start=torch.zeros((), device=_device(terms)))
    return Combined(loss * dist.world_size(), {name: mean.detach() for name, mean in means.items()})


def global_counts(local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the counts [()] of each objective over all ranks with a single all-reduce."""
    total = dist.sum_over_ranks(torch.stack([count.float() for count in local.values()]))
    return dict(zip(local, total.unbind(), strict=True))


def _device(terms: Mapping[str, Term]) -> torch.device:
    return next(iter(terms.values())).total.device
