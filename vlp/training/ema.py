"""An exponential moving average of the weights, kept in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages the trainable parameters: average = decay * average + (1 - decay) * weight.

    The decay is warmed up as min(decay, (1 + step) / (10 + step)), so that the average forgets the initial weights.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"optim.ema_decay={decay} must lie between 0 and 1, for example 0.999; null switches it off."
            )
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in _trainable(module)}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take the weights after optimizer step `step`, from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in _trainable(module):
            self.average[name] = self.average[name].to(parameter.device)  # the module moved after the average was made
            self.average[name].lerp_(parameter.float(), weight)

    def load(self, average: dict[str, Tensor]) -> None:
        """Continue from a stored average.

        Raises:
            ValueError: it is of other parameters than are trained now.
        """
        other = sorted(average.keys() ^ self.average.keys())
        if other:
            raise ValueError(
                f"the stored average and the trained parameters differ in {len(other)} names ({', '.join(other[:3])}); "
                "freeze the same parts and keep optim.ema_decay."
            )
        for name, value in average.items():
            self.average[name].copy_(value)

    @contextmanager
    @torch.no_grad()
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let the module compute with the average inside the block."""
        own = {name: p.detach().clone() for name, p in _trainable(module)}
        for name, parameter in _trainable(module):
            parameter.copy_(self.average[name])
        try:
            yield
        finally:
            for name, parameter in _trainable(module):
                parameter.copy_(own[name])


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
