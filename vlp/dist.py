"""The collectives that losses need; each is a no-op on one process.

Axes: B clips of a rank, W ranks.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor

waited_s = 0.0  # in collectives, for the other ranks; next to nothing where a GPU runs them beside the process
_TEXT_BYTES = 512
num_entered = 0  # collectives that this rank has begun: one that hangs elsewhere has begun fewer than those that wait


def world_size() -> int:
    """Return the number of processes that train together."""
    return torch_dist.get_world_size() if torch_dist.is_available() and torch_dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return torch_dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """all_gather along axis 0 whose backward sums each rank's share of the gradient from all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_gather(x)  # [W*B, ...]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_own_rows(grads[0].contiguous().clone())


def gather(x: Tensor) -> Tensor:
    """Concatenate x [B, ...] of all ranks in rank order to [W*B, ...], with gradients to every rank's part.

    B must be the same on all ranks; the plan pads batches with masked slots to make it so.
    """
    if world_size() == 1:
        return x
    if x.is_floating_point() and x.requires_grad:
        return _Gather.apply(x)  # type: ignore[return-value]
    return _all_gather(x.to(torch.uint8)).bool() if x.dtype == torch.bool else _all_gather(x)  # gloo gathers no bool


def gather_tokens(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gather tokens x [B, N, D] and mask [B, N] of all ranks, padded to the longest N."""
    if world_size() == 1:
        return x, mask
    longest = int(max_over_ranks(torch.tensor(x.shape[1], device=x.device)))
    return gather(_padded(x, longest)), gather(_padded(mask, longest))


def gather_grid(x: Tensor, mask: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gather cells x [B, T, ...], mask [B, T] and prefix [B, P, D] of all ranks, padded to the longest T and P."""
    if world_size() == 1:
        return x, mask, prefix
    num_frames, num_prefix = max_over_ranks(torch.tensor([x.shape[1], prefix.shape[1]], device=x.device)).tolist()
    return gather(_padded(x, num_frames)), gather(_padded(mask, num_frames)), gather(_padded(prefix, num_prefix))


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of x over all ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    with _collective():
        torch_dist.all_reduce(total)
    return total


def sum_own_rows(x: Tensor) -> Tensor:
    """Return this rank's rows [B, ...] of the sum over all ranks of x [W*B, ...], without gradient; overwrites x."""
    if world_size() == 1:
        return x
    with _collective():
        torch_dist.all_reduce(x)  # gloo has no reduce_scatter
    num_rows = len(x) // world_size()
    return x.narrow(0, rank() * num_rows, num_rows)


def max_over_ranks(x: Tensor) -> Tensor:
    """Return the element-wise maximum of x over all ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    largest = x.detach().clone()
    with _collective():
        torch_dist.all_reduce(largest, op=torch_dist.ReduceOp.MAX)
    return largest


def exchange(value: Any, group: Any) -> list[Any]:
    """Return the JSON values of all ranks in rank order.

    Args:
        value: what JSON can hold. group: from `side_group`, None on one process.
    """
    if group is None:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    torch_dist.all_gather(sizes, torch.tensor([len(text)]), group=group)
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    torch_dist.all_gather(texts, F.pad(text, (0, longest - len(text))), group=group)
    return [json.loads(bytes(t[: int(n)].numpy())) for t, n in zip(texts, sizes, strict=True)]


def first_text(text: str, device: torch.device | str) -> str:
    """Return, on all ranks, the first rank's text that is not empty, of at most 512 bytes; each gives its own."""
    mine = torch.zeros(1, _TEXT_BYTES, dtype=torch.uint8)
    data = text.encode()[:_TEXT_BYTES]
    mine[0, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    texts = [bytes(row.tolist()).rstrip(b"\0") for row in gather(mine.to(device)).cpu()]
    return next((each.decode(errors="replace") for each in texts if each), "")


_side: tuple[Any, Any] = (None, None)  # the world and the group that was made in it


def side_group() -> Any:
    """Return a gloo group of all ranks that training does not use, so that other threads may; None on one process.

    The first call in a process group is collective.
    """
    global _side
    if world_size() == 1:
        return None
    if _side[0] is not torch_dist.group.WORLD:
        _side = (torch_dist.group.WORLD, torch_dist.new_group(backend="gloo"))
    return _side[1]


@contextmanager
def _collective() -> Iterator[None]:
    """Count the collective that is begun inside, and the seconds until it lets this process go on."""
    global num_entered, waited_s
    num_entered += 1
    began = time.perf_counter()
    yield
    waited_s += time.perf_counter() - began


def _padded(x: Tensor, length: int) -> Tensor:
    """Pad axis 1 of x [B, N, ...] with zeros to `length`."""
    return F.pad(x, (*[0, 0] * (x.ndim - 2), 0, length - x.shape[1]))


def _all_gather(x: Tensor) -> Tensor:
    x = x.contiguous()  # before `empty_like` copies its strides: NCCL fills parts by memory, not by element
    parts = [torch.empty_like(x) for _ in range(world_size())]
    with _collective():
        torch_dist.all_gather(parts, x)
    return torch.cat(parts)
