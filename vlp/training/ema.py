"""An exponential moving average of the weights, kept in float32; under ZeRO each rank averages its shares."""

from collections.abc import Mapping

import torch

from vlp.training.update import Share


class Ema:
    """Averages the trained weights: average = decay * average + (1 - decay) * weight.

    The decay is warmed up as min(decay, (1 + step) / (10 + step)), so that the average forgets the initial weights.

    Args:
        weights: name -> share, as `Update.weights` gives them.
    """

    def __init__(self, weights: Mapping[str, Share], *, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"optim.ema_decay={decay} must lie between 0 and 1, for example 0.999; null switches it off."
            )
        self.decay = decay
        self.average = {n: share._replace(values=share.values.float().clone()) for n, share in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Share], step: int) -> None:
        """Take the weights after optimizer step `step`, from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, share in weights.items():
            self.average[name].values.lerp_(share.values.float(), weight)
