"""In which precision weights are kept and a step is computed, the same under every strategy.

32-true      weights float32, computed in float32
bf16-mixed   weights float32, computed under autocast in bfloat16
16-mixed     weights float32, computed under autocast in float16, the loss multiplied by a moving scale
bf16-true    weights bfloat16, computed in bfloat16; under ZeRO with float32 masters in the shards
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn


class Precision(NamedTuple):
    """One row of the table above."""

    weights: torch.dtype
    compute: torch.dtype
    scaled: bool = False

    def autocast(self, device: torch.device, *, cache: bool = True) -> AbstractContextManager:
        """Return the context in which the forward pass runs; `cache` keeps cast weights until it is left."""
        on = self.compute != torch.float32
        return torch.autocast(device.type, dtype=self.compute, enabled=on, cache_enabled=cache)

    def convert(self, module: nn.Module) -> None:
        """Cast the floating point parameters; buffers stay: tables of positions and scales need their digits."""
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.weights)


PRECISIONS: Mapping[str, Precision] = {
    "32-true": Precision(torch.float32, torch.float32),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16),
    "16-mixed": Precision(torch.float32, torch.float16, scaled=True),
    "bf16-true": Precision(torch.bfloat16, torch.bfloat16),
}


class LossScale:
    """The factor that keeps small float16 gradients from vanishing: halved when they overflow, doubled after a while.

    It moves by the norm of the global gradient alone, so it is the same on every rank.

    Args:
        start: the first scale. growth_steps: good steps before it is doubled. floor: below this the run must stop.

    Source: arXiv:1710.03740, 3.2.
    """

    def __init__(self, *, start: float = 2.0**16, growth_steps: int = 2000, floor: float = 1.0) -> None:
        self.value, self.growth_steps, self.floor = start, growth_steps, floor
        self.good_steps = 0

    def accept(self) -> None:
        """Count a step whose gradient was finite."""
        self.good_steps += 1
        if self.good_steps >= self.growth_steps:
            self.value, self.good_steps = self.value * 2, 0

    def lower(self) -> bool:
        """Halve the scale after an overflow; return False, and stay, where that would go below the floor."""
        if self.value / 2 < self.floor:
            return False
        self.value, self.good_steps = self.value / 2, 0
        return True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
