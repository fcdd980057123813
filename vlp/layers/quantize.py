"""Vectors to the nearest of K codes, with a gradient.

Axes: N vectors, D width, E width of a code, K codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 16_384  # vectors whose similarities to all codes are held at once


class Quantized(NamedTuple):
    """What became of vectors [..., D]."""

    x: Tensor  # [..., D], from the code vectors alone; its gradient reaches the input and the code
    near: Tensor  # [..., E], what was looked up, unit vectors
    chosen: Tensor  # [..., E], the nearest code vectors, unit vectors
    codes: Tensor  # [...] int64


class Quantizer(nn.Module):
    """The nearest of K unit vectors in a space of few dimensions.

    The codes are a table that stays as it was fitted, under one learned matrix: what moves a code that is chosen moves
    those that are not, so that none is left behind where no vector comes.

    Args:
        dim: D. num_codes: K. code_dim: E.

    Source: arXiv:1711.00937, 3.2 (straight-through gradient); unit vectors of few dimensions: arXiv:2110.04627, 3.2;
    the matrix: arXiv:2411.02038, 3.2. Deviation: the gradient of what follows reaches the chosen code as well, so that
    codes learn what they are used for.
    """

    table: Tensor

    def __init__(self, *, dim: int, num_codes: int, code_dim: int = 32) -> None:
        super().__init__()
        if num_codes < 2:
            raise ValueError(f"num_codes={num_codes} must be at least 2.")
        self.dim, self.num_codes = dim, num_codes
        self.down, self.up = nn.Linear(dim, code_dim), nn.Linear(code_dim, dim)
        self.turn = nn.Linear(code_dim, code_dim, bias=False)
        self.register_buffer("table", torch.zeros(num_codes, code_dim))
        self.place(F.normalize(torch.randn(num_codes, code_dim), dim=-1))

    @torch.no_grad()
    def place(self, vectors: Tensor) -> None:
        """Put the codes at unit vectors [K, E]."""
        self.table.copy_(vectors)
        nn.init.eye_(self.turn.weight)

    def forward(self, x: Tensor) -> Quantized:
        """Map [..., D] to codes and what they stand for."""
        near = F.normalize(self.down(x).float(), dim=-1)  # [..., E]
        table = F.normalize(self.turn(self.table).float(), dim=-1)
        codes = nearest(near.detach().flatten(0, -2), table.detach()).view(near.shape[:-1])
        chosen = F.embedding(codes, table)
        passed = chosen + (near - near.detach())  # the value of `chosen`, a gradient to both
        return Quantized(self.up(passed.to(x.dtype)), near, chosen, codes)


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """Return for each of [N, E] the most similar of [K, E], both unit vectors: [N] int64; of equal ones the first."""
    with torch.autocast(vectors.device.type, enabled=False):
        parts = [(part.float() @ table.float().T).argmax(1) for part in vectors.split(_CHUNK)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=vectors.device)
