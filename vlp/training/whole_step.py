"""Objectives over a whole optimizer step, in the memory of one of its micro-batches.

    pass 1   micro-batch k -> encoders without gradient -> embeddings of k, kept (a few numbers a clip)
    between  embeddings of all micro-batches (and ranks) -> objective -> the gradient of each embedding
    pass 2   micro-batch k -> encoders with gradient -> embeddings times their gradient, and all other objectives
             the last one -> the objective itself, on its own embeddings and the kept ones of the others

An objective says with `spans` which of its roles it takes from all micro-batches, joined along the clips; its other
roles must not depend on the batch (a temperature). The gradient is that of one pass over the step: the random stream
of a micro-batch is restarted before either pass, what spans is computed first in both, and buffers are put back.
The last micro-batch sees the objective itself, so that temperatures and heads get their gradient where data parallelism
waits for it.

Source: arXiv:2101.06983.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlp.forward import ForwardPass, Wiring
from vlp.types import Term

Roles = dict[str, Tensor]


class WholeStep:
    """The objectives with `spans`, and what is kept of the micro-batches of the present step."""

    def __init__(self, objectives: Mapping[str, nn.Module], wirings: Mapping[str, Wiring]) -> None:
        self.spans: dict[str, tuple[str, ...]] = {
            name: spans for name, objective in objectives.items() if (spans := getattr(objective, "spans", ()))
        }
        self.objectives = {name: objectives[name] for name in self.spans}
        self.wirings = {name: wirings[name] for name in self.spans}
        self.kept: list[dict[str, Roles]] = []  # of each micro-batch, by objective
        self.slopes: list[dict[str, Roles]] = []  # gradients of the above

    def prepare(self, passes: Sequence[ForwardPass], seed: Callable[[int], None]) -> None:
        """Do pass 1 and find the gradients of the embeddings; nothing to do for one micro-batch.

        Args:
            passes: of the micro-batches of this step. seed: restarts the random stream of a micro-batch.
        """
        self.kept, self.slopes = [], []
        if len(passes) == 1 or not self.spans:
            return
        with torch.no_grad(), _buffers_kept(passes[0].model):
            for number, forward in enumerate(passes):
                seed(number)
                self.kept.append(self._spanning(forward))
                rest = {name: self._others(name, forward) for name in self.spans}
                forward.values.clear()
        self.slopes = [{} for _ in passes]
        for name in self.spans:
            self._differentiate(name, rest[name])

    def terms(self, number: int, forward: ForwardPass) -> dict[str, Term]:
        """Return the terms of micro-batch `number` in pass 2; none where the step has one micro-batch."""
        if not self.kept:
            return {}
        live = self._spanning(forward)  # before all else, so that the draws are those of pass 1
        if number < len(self.kept) - 1:
            return {name: _carrier(live[name], self.slopes[number][name]) for name in self.spans}
        joined = {
            name: {role: torch.cat([*(kept[name][role] for kept in self.kept[:-1]), x]) for role, x in roles.items()}
            for name, roles in live.items()
        }
        return {name: self._call(name, joined[name], self._others(name, forward)) for name in self.spans}

    def _spanning(self, forward: ForwardPass) -> dict[str, Roles]:
        return {
            name: {role: forward.take(self.wirings[name][role]) for role in spans}  # type: ignore[arg-type]
            for name, spans in self.spans.items()
        }

    def _others(self, name: str, forward: ForwardPass) -> dict[str, Any]:
        wiring = {role: node for role, node in self.wirings[name].items() if role not in self.spans[name]}
        return dict(zip(wiring, forward.roles(wiring), strict=True))

    def _call(self, name: str, joined: Mapping[str, Tensor], others: Mapping[str, Any]) -> Term:
        values = {**joined, **others}
        return self.objectives[name](*(values[role] for role in self.wirings[name]))

    def _differentiate(self, name: str, others: Mapping[str, Any]) -> None:
        """Store the gradient that the sum of all ranks' terms has by each kept embedding of this rank."""
        joined = {role: torch.cat([kept[name][role] for kept in self.kept]) for role in self.spans[name]}
        leaves = {role: x.requires_grad_() for role, x in joined.items() if x.is_floating_point()}
        total = self._call(name, joined, others).total
        grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        for role, grad in zip(leaves, grads, strict=True):
            for slopes, part in zip(self.slopes, grad.chunk(len(self.kept)), strict=True):
                slopes.setdefault(name, {})[role] = part


def _carrier(live: Roles, slopes: Roles) -> Term:
    """Return a term of value 0 whose gradient by each live embedding is the given one."""
    dots = [(live[role].float() * slope).sum() for role, slope in slopes.items()]
    total = torch.stack(dots).sum()
    return Term(total - total.detach(), torch.zeros((), device=total.device))


@contextmanager
def _buffers_kept(module: nn.Module):
    """Put the buffers back after the block: running statistics must not count a micro-batch twice."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)
