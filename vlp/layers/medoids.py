"""Key frames: the frames that stand for the others.

Axes: B clips, N frames, K key frames, E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.layers.grid import prefix_mask
from vlp.types import Grid


@torch.no_grad()
def k_medoids(x: Tensor, mask: Tensor, num_medoids: int, *, max_rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Choose among real vectors those from which the others are near, by Euclidean distance.

    It starts with the longest vector and then takes the one farthest from those chosen (KKZ); a round assigns every
    vector to its nearest medoid and moves each medoid to the member nearest to all; it ends when none moves.

    Args:
        x: [B, N, E], clustered in float32. mask: [B, N] bool, True = real.

    Returns:
        places [B, K] in increasing order, and [B, K] bool, False where a clip has fewer real vectors than K.

    Source: arXiv:2408.07249, 3.3. Deviation: padding takes no part, where the published code clusters it too.
    """
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # [B, N, N]
    places, there = _far_apart(x, distance, mask, num_medoids)
    for _ in range(max_rounds):
        moved = _round(distance, mask, places, there)
        if moved.is_meta or torch.equal(moved, places):  # plan.py traces shapes alone
            break
        places = moved
    order = torch.where(there, places, x.shape[1]).argsort(dim=1)
    return places.gather(1, order), there.gather(1, order)


class KeyFramePool(nn.Module):
    """The mean of the unit vectors of the key frames' class tokens, or the largest of each number.

    Args:
        dim: E. num_key_frames: K. largest: take the maximum in place of the mean.
    """

    def __init__(self, *, dim: int, num_key_frames: int = 16, largest: bool = False) -> None:
        super().__init__()
        self.dim = dim
        if num_key_frames < 1:
            raise ValueError(f"num_key_frames={num_key_frames} must be at least 1.")
        self.num_key_frames, self.largest = num_key_frames, largest

    def forward(self, video: Grid) -> Tensor:
        """Map a grid with one class token a frame, prefix [B, T, E], to [B, E]."""
        frames, mask = video.prefix, prefix_mask(video)
        places, there = k_medoids(frames.detach(), mask, min(self.num_key_frames, frames.shape[1]))
        chosen = F.normalize(frames.take_along_dim(places[..., None], dim=1), dim=-1)  # [B, K, E]
        if self.largest:
            some = there | ~there.any(1, keepdim=True)
            return chosen.masked_fill(~some[..., None], -torch.inf).amax(1)
        weight = there.to(chosen.dtype)
        return torch.einsum("bke,bk->be", chosen, weight / weight.sum(1, keepdim=True).clamp(min=1.0))


def _far_apart(x: Tensor, distance: Tensor, mask: Tensor, num_medoids: int) -> tuple[Tensor, Tensor]:
    """Return the first medoids [B, K], and which of them are different real vectors."""
    rows = torch.arange(len(x), device=x.device)
    chosen = [x.norm(dim=-1).masked_fill(~mask, -1.0).argmax(1)]
    nearest = distance[rows, chosen[0]]  # [B, N], to the nearest medoid so far
    taken = F.one_hot(chosen[0], x.shape[1]).bool()
    for _ in range(num_medoids - 1):
        chosen.append(nearest.masked_fill(taken | ~mask, -1.0).argmax(1))
        taken = taken | F.one_hot(chosen[-1], x.shape[1]).bool()
        nearest = torch.minimum(nearest, distance[rows, chosen[-1]])
    counts = torch.arange(num_medoids, device=x.device)
    return torch.stack(chosen, dim=1), counts < mask.sum(1, keepdim=True)


def _round(distance: Tensor, mask: Tensor, places: Tensor, there: Tensor) -> Tensor:
    """Return the medoids [B, K] after one round."""
    to_medoid = distance.take_along_dim(places[:, :, None], dim=1).masked_fill(~there[:, :, None], torch.inf)
    own = to_medoid.argmin(1)  # [B, N]
    member = (own[:, None] == torch.arange(places.shape[1], device=own.device)[:, None]) & mask[:, None]  # [B, K, N]
    cost = torch.einsum("bkn,bnm->bkm", member.to(distance.dtype), distance)
    best = cost.masked_fill(~member, torch.inf).argmin(2)
    return torch.where(there & member.any(2), best, places)
