"""The temperature of a similarity: a parameter read only inside its owner's forward, with explicit init and bounds."""

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """Multiplies cosine similarities by `1 / temperature`.

    Args:
        init: temperature at the start (CLIP 0.07, Frozen in Time 0.05).
        min_temperature, max_temperature: hard bounds, held after every step (CLIP: scale at most 100, that is 0.01).
        learnable: a parameter if true; else a constant.
        log_space: learn log(scale), as CLIP does; else learn the temperature itself, as ALBEF does.

    Source: arXiv:2103.00020, 2.5.
    """

    def __init__(
        self,
        *,
        init: float = 0.07,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        learnable: bool = True,
        log_space: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < min_temperature <= init <= max_temperature:
            raise ValueError(
                f"init={init} must lie between min_temperature={min_temperature} and "
                f"max_temperature={max_temperature}, all above 0; change model.temperature."
            )
        self.log_space = log_space
        self.bounds = (min_temperature, max_temperature)
        value = torch.tensor([-math.log(init) if log_space else init])  # [1]: DeepSpeed shards no number without axes
        self.value = nn.Parameter(value, requires_grad=learnable)

    def forward(self) -> Tensor:
        """Return the scale, 1 / temperature, a scalar float32."""
        value = self.value.float().squeeze(0)
        return value.exp() if self.log_space else 1 / value

    @property
    def value_bounds(self) -> tuple[float, float]:
        """Return the bounds of `value`, inside which the training brings it back after every step."""
        low, high = self.bounds
        return (-math.log(high), -math.log(low)) if self.log_space else (low, high)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the temperature back inside its bounds."""
        self.value.clamp_(*self.value_bounds)
