"""Are the weights of all ranks still the same? A digest on the device, so that comparing costs one pass over them.

Axes: W ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlp import dist

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed integer: odd, so that multiplying loses no bit


class DivergedError(RuntimeError):
    """Ranks that should hold the same weights do not."""


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Return an int64 digest of all bits of the tensors [()], the same whatever the order in which a device adds.

    Each byte is multiplied by an odd number of its place and summed modulo 2**64, so a single flipped bit shows.
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).long()  # [bytes]
        places = torch.arange(1, len(flat) + 1, device=flat.device) * _GOLDEN | 1
        total = total.to(flat.device) * 31 + (flat * places).sum()
    return total


def of_module(module: nn.Module) -> Tensor:
    """Return the digest of parameters and buffers."""
    return digest([*module.parameters(), *module.buffers()])


def check(module: nn.Module, step: int) -> None:
    """Compare the weights of all ranks; the same answer on each of them.

    Raises:
        DivergedError: they differ; names the ranks in the minority.
    """
    if dist.world_size() == 1:
        return
    digests = dist.gather(of_module(module).reshape(1)).tolist()  # [W]
    if len(set(digests)) == 1:
        return
    usual = max(digests, key=digests.count)
    others = [rank for rank, found in enumerate(digests) if found != usual]
    raise DivergedError(
        f"after step {step} the weights of rank {', '.join(map(str, others))} differ from those of the other ranks; "
        "nothing of it was saved. Look for a faulty device there, exclude its node, and start again."
    )
