"""Weights that are a formula of a parameter's name, so that two modules with the same names compute the same."""

import zlib

import torch
from torch import nn


def fill(module: nn.Module, scale: float = 0.2) -> nn.Module:
    """Give every parameter numbers between -scale and scale that depend on its name and the place alone."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            start = zlib.crc32(name.encode()) % 1000
            parameter.copy_(scale * wave(parameter.shape, start))
    return module.eval()


def wave(shape: tuple[int, ...] | torch.Size, start: int = 0) -> torch.Tensor:
    """Return numbers between -1 and 1 of this shape."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + start
    return (0.37 * places).sin().mul((0.011 * places).cos()).float().view(shape)
