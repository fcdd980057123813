"""How the blocks of an image transformer see time: objects that turn a timm block into a space-time block.

Axes: B clips, T frames (or tubelets), S patches of a frame, P prefix tokens, N = P + T*S tokens, D width.
A space-time block maps [B, N, D] to [B, N, D]. It keeps the parameters of the image block under timm's names.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vlp.layers.attention import SelfAttention
from vlp.layers.pool import masked_mean


class TimeMixing(Protocol):
    """What `SpaceTimeVit` needs to know of time; called once for each block of the image model."""

    def __call__(self, block: nn.Module, *, dim: int, num_heads: int) -> nn.Module:
        """Return a module `(x [B, N, D], frame_mask [B, T] bool or None, num_prefix, num_frames) -> [B, N, D]`."""
        ...


class Joint:
    """One attention over all tokens of all frames. Source: arXiv:2103.15691, model 1."""

    def __call__(self, block: nn.Module, *, dim: int, num_heads: int) -> nn.Module:
        """Return a `JointBlock` with the parameters of `block`."""
        return JointBlock(block)


class Divided:
    """Attention over time at each place, then over space in each frame. Source: arXiv:2102.05095.

    Deviation: the output projection of the attention over time starts at zero, in place of a further linear layer.
    So a fresh model gives for one frame, for equal frames, or without a class token, what the image model gives.
    """

    def __call__(self, block: nn.Module, *, dim: int, num_heads: int) -> nn.Module:
        """Return a `DividedBlock` with the parameters of `block` and a new attention over time."""
        return DividedBlock(block, dim=dim, num_heads=num_heads)


class JointBlock(nn.Module):
    """A timm block whose sequence is the whole clip."""

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        _adopt(self, block)

    def forward(self, x: Tensor, frame_mask: Tensor | None, num_prefix: int, num_frames: int) -> Tensor:
        """Map [B, N, D] to [B, N, D]; nothing looks at the patches of unreal frames."""
        mask = None
        if frame_mask is not None:
            num_patches = (x.shape[1] - num_prefix) // num_frames
            mask = F.pad(repeat(frame_mask, "b t -> b (t s)", s=num_patches), (num_prefix, 0), value=True)  # [B, N]
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DividedBlock(nn.Module):
    """A timm block applied to each frame, after an attention over time at each place.

    Prefix tokens take part in the attention over space only: repeated for each frame, then averaged over real frames.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, *, dim: int, num_heads: int) -> None:
        super().__init__()
        _adopt(self, block)
        self.time_norm = nn.LayerNorm(dim)
        self.time_attn = SelfAttention(dim=dim, num_heads=num_heads)
        nn.init.trunc_normal_(self.time_attn.qkv.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.time_attn.qkv.bias)
        nn.init.zeros_(self.time_attn.proj.weight)
        nn.init.zeros_(self.time_attn.proj.bias)

    def forward(self, x: Tensor, frame_mask: Tensor | None, num_prefix: int, num_frames: int) -> Tensor:
        """Map [B, N, D] to [B, N, D]; real frames do not see unreal ones."""
        prefix, cells = x[:, :num_prefix], x[:, num_prefix:]
        cells = cells + self.drop_path1(self._over_time(cells, frame_mask, num_frames))
        x = torch.cat([prefix, cells], dim=1)
        x = x + self.drop_path1(self._over_space(prefix, cells, frame_mask, num_frames))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _over_time(self, cells: Tensor, frame_mask: Tensor | None, num_frames: int) -> Tensor:
        num_patches = cells.shape[1] // num_frames
        lines = rearrange(self.time_norm(cells), "b (t s) d -> (b s) t d", t=num_frames)  # [B*S, T, D]
        mask = None if frame_mask is None else repeat(frame_mask, "b t -> (b s) t", s=num_patches)
        return rearrange(self.time_attn(lines, mask), "(b s) t d -> b (t s) d", s=num_patches)  # [B, T*S, D]

    def _over_space(self, prefix: Tensor, cells: Tensor, frame_mask: Tensor | None, num_frames: int) -> Tensor:
        num_prefix = prefix.shape[1]
        frames = rearrange(cells, "b (t s) d -> (b t) s d", t=num_frames)  # [B*T, S, D]
        if num_prefix:
            frames = torch.cat([repeat(prefix, "b p d -> (b t) p d", t=num_frames), frames], dim=1)
        out = self.ls1(self.attn(self.norm1(frames)))  # [B*T, P+S, D]
        cells = rearrange(out[:, num_prefix:], "(b t) s d -> b (t s) d", t=num_frames)
        if not num_prefix:
            return cells
        prefixes = rearrange(out[:, :num_prefix], "(b t) p d -> b t (p d)", t=num_frames)
        mean = prefixes.mean(1) if frame_mask is None else masked_mean(prefixes, frame_mask)
        return torch.cat([rearrange(mean, "b (p d) -> b p d", p=num_prefix), cells], dim=1)


def _adopt(target: nn.Module, block: nn.Module) -> None:
    """Give `target` the children of a timm block, under the same names."""
    if type(block) is not Block:
        raise ValueError(
            f"the blocks of this timm model are {type(block).__name__}, but space-time attention needs timm's plain "
            "pre-norm Block; choose another name, or TimmFrames, which runs any backbone per frame."
        )
    for name, child in block.named_children():
        setattr(target, name, child)
