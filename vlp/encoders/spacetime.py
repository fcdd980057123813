"""How the blocks of an image transformer see time: objects that turn a timm block into a space-time block.

Axes: B clips, T frames (or tubelets), S patches of a frame, P prefix tokens, N = P + T*S tokens, D width, H heads,
d width of a head, L levels, V tokens of a level.
A space-time block maps [B, N, D] to [B, N, D]. It keeps the parameters of the image block under timm's names.
"""

from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vlp.layers.attention import SelfAttention, attend, silence
from vlp.layers.pool import masked_mean

_EPS = 1e-6  # of the norms of published image transformers


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


class DividedWithClass:
    """Divided attention in which patches also see the class token, and the class token sees everything, twice.

    The attention over space reads what the attention over time has changed, but its output is added to what the block
    was given. Source: arXiv:2104.00650, 3.2. The attention over time starts with queries, keys and values of zero and
    a projection of ones, so that a fresh model of one frame is the image model and gradients still flow.
    """

    def __call__(self, block: nn.Module, *, dim: int, num_heads: int) -> nn.Module:
        """Return a `ClassDividedBlock` with the parameters of `block` and a new attention over time."""
        return ClassDividedBlock(block, dim=dim, num_heads=num_heads)


class Hierarchical:
    """Attention over time at each place, then one attention under a mask: frames see themselves and summary tokens.

    The prefix is [class token, summary tokens of level 0, of level 1, ...]; a summary token of level u sees those of
    levels up to u and every `ratio` ** u-th frame. Give the image model `reg_tokens: num_levels * tokens_per_level`.

    Args:
        num_levels: L. tokens_per_level: V. ratio: of the frame rates of neighbouring levels.
        patches_see_class: the paper's text says no, its formula yes; with yes, a fresh model of one frame without
            summary tokens is the image model.

    Source: arXiv:2403.14870, 3.2 and eq. 2. Its attention over time starts with an output projection of zero.
    """

    def __init__(
        self, *, num_levels: int = 3, tokens_per_level: int = 4, ratio: int = 2, patches_see_class: bool = True
    ) -> None:
        if min(num_levels, tokens_per_level) < 0 or ratio < 1:
            raise ValueError(
                f"num_levels={num_levels} and tokens_per_level={tokens_per_level} must be 0 or more, ratio={ratio} at "
                "least 1."
            )
        self.num_levels, self.tokens_per_level, self.ratio = num_levels, tokens_per_level, ratio
        self.patches_see_class = patches_see_class

    def __call__(self, block: nn.Module, *, dim: int, num_heads: int) -> nn.Module:
        """Return a `HierarchicalBlock` with the parameters of `block` and a new attention over time."""
        return HierarchicalBlock(block, dim=dim, num_heads=num_heads, sees=self)

    def mask(self, num_prefix: int, num_frames: int, num_patches: int, device: torch.device) -> Tensor:
        """Return [N, N] bool: does the token of the row see that of the column?

        Raises:
            ValueError: the model has another number of summary tokens.
        """
        num_summary = self.num_levels * self.tokens_per_level
        if num_prefix != 1 + num_summary:
            raise ValueError(
                f"{num_prefix} prefix tokens, but {self.num_levels} levels of {self.tokens_per_level} summary tokens "
                f"and a class token make {1 + num_summary}; set overrides.reg_tokens to {num_summary}."
            )
        layout = (self.num_levels, self.tokens_per_level, self.ratio, self.patches_see_class)
        return _hierarchy(*layout, num_frames, num_patches, device)


class JointBlock(nn.Module):
    """A timm block whose sequence is the whole clip."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        _adopt(self, block)

    def forward(self, x: Tensor, frame_mask: Tensor | None, num_prefix: int, num_frames: int) -> Tensor:
        """Map [B, N, D] to [B, N, D]; nothing looks at the patches of unreal frames."""
        mask = _token_mask(frame_mask, num_prefix, (x.shape[1] - num_prefix) // num_frames)
        x = x + _attention(self, x, mask)
        return x + _mlp(self, x)


class DividedBlock(nn.Module):
    """A timm block applied to each frame, after an attention over time at each place.

    Prefix tokens take part in the attention over space only: repeated for each frame, then averaged over real frames.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module

    def __init__(self, block: nn.Module, *, dim: int, num_heads: int) -> None:
        super().__init__()
        _adopt(self, block)
        self.time = TimeBranch(dim=dim, num_heads=num_heads)

    def forward(self, x: Tensor, frame_mask: Tensor | None, num_prefix: int, num_frames: int) -> Tensor:
        """Map [B, N, D] to [B, N, D]; real frames do not see unreal ones."""
        prefix, cells = x[:, :num_prefix], x[:, num_prefix:]
        cells = cells + self.drop_path1(self.time(cells, frame_mask, num_frames))
        x = torch.cat([prefix, cells], dim=1)
        x = x + self.drop_path1(self._over_space(prefix, cells, frame_mask, num_frames))
        return x + _mlp(self, x)

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


class ClassDividedBlock(nn.Module):
    """A timm block behind an attention over time; both attentions let patches see the prefix, which sees all."""

    attn: Any

    def __init__(self, block: nn.Module, *, dim: int, num_heads: int) -> None:
        super().__init__()
        _adopt(self, block)
        self.attn = GroupAttention(self.attn, num_heads=num_heads, axis="s")
        self.time_norm = nn.LayerNorm(dim, eps=_EPS)
        over_time = SelfAttention(dim=dim, num_heads=num_heads)
        for parameter in over_time.parameters():
            nn.init.zeros_(parameter)
        nn.init.ones_(over_time.proj.weight)
        self.time_attn = GroupAttention(over_time, num_heads=num_heads, axis="t")

    def forward(self, x: Tensor, frame_mask: Tensor | None, num_prefix: int, num_frames: int) -> Tensor:
        """Map [B, N, D] to [B, N, D]; real frames and the prefix do not see unreal frames."""
        over_time = x + self.time_attn(self.time_norm(x), frame_mask, num_prefix, num_frames)
        x = x + _attention(self, over_time, frame_mask, num_prefix, num_frames)
        return x + _mlp(self, x)


class GroupAttention(nn.Module):
    """Attention in which a patch sees the prefix and the patches along one axis, and the prefix sees everything."""

    def __init__(self, source: Any, *, num_heads: int, axis: str) -> None:
        """Take the `qkv` and `proj` of `source`; `axis` is "t" (the same place in all frames) or "s" (the frame)."""
        super().__init__()
        self.num_heads, self.axis = num_heads, axis
        self.pattern = f"b h (t s) d -> (b {'s' if axis == 't' else 't'}) h {axis} d"
        self.qkv: nn.Module = source.qkv
        self.proj: nn.Module = source.proj

    def forward(self, x: Tensor, frame_mask: Tensor | None, num_prefix: int, num_frames: int) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads).unbind(0)
        num_patches = (x.shape[1] - num_prefix) // num_frames
        prefix = attend(q[:, :, :num_prefix], k, v, mask=_token_mask(frame_mask, num_prefix, num_patches))
        groups = [rearrange(part[:, :, num_prefix:], self.pattern, t=num_frames) for part in (q, k, v)]
        count = len(groups[0]) // len(x)
        keys, values = (
            torch.cat([repeat(part[:, :, :num_prefix], "b h p d -> (b g) h p d", g=count), own], dim=2)
            for part, own in ((k, groups[1]), (v, groups[2]))
        )
        line_mask = None  # of the keys of a group: a frame is real or not as a whole
        if frame_mask is not None and self.axis == "t":
            line_mask = F.pad(repeat(frame_mask, "b t -> (b s) t", s=count), (num_prefix, 0), value=True)
        patches = attend(groups[0], keys, values, mask=line_mask)
        back = " -> ".join(reversed(self.pattern.split(" -> ")))
        patches = rearrange(patches, back, t=num_frames, s=num_patches)  # [B, H, T*S, d]
        return self.proj(rearrange(torch.cat([prefix, patches], dim=2), "b h n d -> b n (h d)"))


class HierarchicalBlock(nn.Module):
    """A timm block behind an attention over time at each place; its own attention sees what `sees.mask` says."""

    drop_path1: nn.Module

    def __init__(self, block: nn.Module, *, dim: int, num_heads: int, sees: Hierarchical) -> None:
        super().__init__()
        _adopt(self, block)
        self.time = TimeBranch(dim=dim, num_heads=num_heads)
        self.sees = sees

    def forward(self, x: Tensor, frame_mask: Tensor | None, num_prefix: int, num_frames: int) -> Tensor:
        """Map [B, N, D] to [B, N, D]; nothing looks at the patches of unreal frames."""
        cells = x[:, num_prefix:]
        cells = cells + self.drop_path1(self.time(cells, frame_mask, num_frames))
        x = torch.cat([x[:, :num_prefix], cells], dim=1)
        num_patches = cells.shape[1] // num_frames
        mask = self.sees.mask(num_prefix, num_frames, num_patches, x.device)[None, None]  # [1, 1, N, N]
        if frame_mask is not None:
            mask = mask & _token_mask(frame_mask, num_prefix, num_patches)[:, None, None]
        x = x + _attention(self, x, mask)
        return x + _mlp(self, x)


class TimeBranch(nn.Module):
    """The residual branch of attention over time at each place; its output projection starts at zero."""

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim=dim, num_heads=num_heads)
        silence(self.attn)

    def forward(self, cells: Tensor, frame_mask: Tensor | None, num_frames: int) -> Tensor:
        """Map [B, T*S, D] to [B, T*S, D]; real frames do not see unreal ones."""
        num_patches = cells.shape[1] // num_frames
        lines = rearrange(self.norm(cells), "b (t s) d -> (b s) t d", t=num_frames)  # [B*S, T, D]
        mask = None if frame_mask is None else repeat(frame_mask, "b t -> (b s) t", s=num_patches)
        return rearrange(self.attn(lines, mask), "(b s) t d -> b (t s) d", s=num_patches)


@lru_cache(maxsize=64)  # one a shape of clips: built once and not in every block of every step
def _hierarchy(
    num_levels: int,
    tokens_per_level: int,
    ratio: int,
    patches_see_class: bool,
    num_frames: int,
    num_patches: int,
    device: torch.device,
) -> Tensor:
    """Return the mask [N, N] of `Hierarchical`; summary tokens never see the class token, which sees everything."""
    level = torch.arange(num_levels).repeat_interleave(tokens_per_level)  # [L*V]
    frame = torch.arange(num_frames).repeat_interleave(num_patches)  # [T*S]
    num_summary, num_cells = len(level), len(frame)
    reads_frame = frame[None] % (ratio**level)[:, None] == 0  # [L*V, T*S]
    of_class = torch.ones(1, 1 + num_summary + num_cells, dtype=torch.bool)
    no_class = torch.zeros(num_summary, 1, dtype=torch.bool)
    of_summary = torch.cat([no_class, level[None] <= level[:, None], reads_frame], dim=1)
    to_class = torch.full((num_cells, 1), patches_see_class)
    to_summary = torch.ones(num_cells, num_summary, dtype=torch.bool)
    of_patch = torch.cat([to_class, to_summary, frame[None] == frame[:, None]], dim=1)
    return torch.cat([of_class, of_summary, of_patch]).to(device)


def _token_mask(frame_mask: Tensor | None, num_prefix: int, num_patches: int) -> Any:
    """Return [B, P + T*S] bool, True = real; None where all frames are."""
    if frame_mask is None:
        return None
    return F.pad(repeat(frame_mask, "b t -> b (t s)", s=num_patches), (num_prefix, 0), value=True)


def _adopt(target: nn.Module, block: nn.Module) -> None:
    """Give `target` the children of a timm block, under the same names."""
    if type(block) is not Block:
        raise ValueError(
            f"the blocks of this timm model are {type(block).__name__}, but space-time attention needs timm's plain "
            "pre-norm Block; choose another name, or TimmFrames, which runs any backbone per frame."
        )
    for name, child in block.named_children():
        setattr(target, name, child)


def _attention(block: Any, x: Tensor, *what_is_seen: Any) -> Tensor:
    """Return the attention branch of a block with the children of a timm block."""
    return block.drop_path1(block.ls1(block.attn(block.norm1(x), *what_is_seen)))


def _mlp(block: Any, x: Tensor) -> Tensor:
    """Return the other branch."""
    return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
