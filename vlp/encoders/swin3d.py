"""A video transformer of shifted space-time windows that keeps every frame.

Axes: B clips, T frames, H W pixels or cells, D width, G windows, N tokens of a window (t h w), h heads, d their width.
Source: arXiv:2106.13230 (Video Swin), with the stride 1 in time of arXiv:2111.12681: a patch spans two frames, and a
zero frame follows the last one. Parameters have the published names.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vlp.layers.attention import attend
from vlp.layers.block import DropPath, Mlp, drop_path_rates
from vlp.layers.patch import zero_cells
from vlp.types import Grid

Triple = tuple[int, int, int]  # time, height, width


class SwinVideo(nn.Module):
    """Windows over time and space in stages, each with half the cells a side and twice the width.

    Args:
        size: pixels a side of a frame, a multiple of `patch_size` times 2 ** (stages - 1).
        width: of the first stage. depths, heads: blocks and heads of each stage. window: frames, cells, cells.
        patch_size: pixels a side of a cell of the first stage.
        drop_path: probability of the last block, linear in depth.

    Deviation: where a window is larger than the grid in space, the biases are those of the right places; the published
    code takes the first rows of its table.
    """

    def __init__(
        self,
        *,
        size: int,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 18, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Sequence[int] = (8, 7, 7),
        patch_size: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(heads):
            raise ValueError(f"depths={list(depths)} and heads={list(heads)} must name the same number of stages.")
        self.patch_size, self.tubelet_size, self.size = patch_size * 2 ** (len(depths) - 1), 1, size
        if size % self.patch_size:
            raise ValueError(
                f"size={size} is not a multiple of the encoder's stride of {self.patch_size} pixels; "
                f"set clip.size to {max(size - size % self.patch_size, self.patch_size)}."
            )
        self.dim = width * 2 ** (len(depths) - 1)
        self.patch_embed = PairEmbed(dim=width, patch_size=patch_size)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        frames, cells, _ = shape = (int(window[0]), int(window[1]), int(window[2]))
        assert cells > 0 and frames > 0, "checked by the schema"
        self.layers = nn.ModuleList(
            Stage(
                dim=width * 2**number,
                num_heads=heads[number],
                window=shape,
                rates=[next(rates) for _ in range(depth)],
                merges=number < len(depths) - 1,
            )
            for number, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, pixels: Tensor, frame_mask: Tensor | None = None, hidden: Tensor | None = None) -> Grid:
        """Encode clips.

        Args:
            pixels: [B, T, 3, H, W] float, normalised. frame_mask: [B, T] bool, True = real.
            hidden: [B, T, H', W'] bool, True = the pixels of this cell of the result are zeroed.

        Returns:
            Grid of [B, T, H / patch_size, W / patch_size, D] without prefix.
        """
        if tuple(pixels.shape[-2:]) != (self.size, self.size):
            raise ValueError(
                f"frames have {pixels.shape[-2]} x {pixels.shape[-1]} pixels, but the encoder was built for "
                f"{self.size}; set clip.size and the transforms to the same size."
            )
        if hidden is not None:
            pixels = zero_cells(pixels, hidden)
        if frame_mask is not None:  # what follows the last real frame is a zero frame, as at the end of a clip
            pixels = pixels.masked_fill(~frame_mask[:, :, None, None, None], 0.0)
        x = self.patch_embed(pixels)  # [B, T, h, w, D]
        for stage in self.layers:
            x = stage(x, frame_mask)
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if frame_mask is None else frame_mask
        return Grid(self.norm(x), mask, x.new_zeros(len(x), 0, self.dim))


class PairEmbed(nn.Module):
    """Patches of two frames at every frame: one embedding a frame."""

    def __init__(self, *, dim: int, patch_size: int) -> None:
        super().__init__()
        kernel = (2, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, kernel_size=kernel, stride=(1, patch_size, patch_size))
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map [B, T, 3, H, W] to [B, T, H / patch_size, W / patch_size, D]."""
        clips = F.pad(rearrange(pixels, "b t c h w -> b c t h w"), (0, 0, 0, 0, 0, 1))
        return self.norm(rearrange(self.proj(clips), "b d t h w -> b t h w d"))


class Stage(nn.Module):
    """Blocks whose windows are shifted by half in every second one; then four neighbouring cells become one."""

    def __init__(self, *, dim: int, num_heads: int, window: Triple, rates: Sequence[float], merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            WindowBlock(dim=dim, num_heads=num_heads, window=window, shifted=bool(number % 2), drop_path=rate)
            for number, rate in enumerate(rates)
        )
        self.downsample = MergeCells(dim=dim) if merges else nn.Identity()

    def forward(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Map [B, T, H, W, D] to [B, T, H/2, W/2, 2 D], or to the same shape in the last stage."""
        for block in self.blocks:
            x = block(x, frame_mask)
        return self.downsample(x)


class MergeCells(nn.Module):
    """Join each 2 x 2 cells."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, H, W, D] to [B, T, H/2, W/2, 2 D]."""
        return self.reduction(self.norm(rearrange(x, "b t (h p) (w q) d -> b t h w (q p d)", p=2, q=2)))


class WindowBlock(nn.Module):
    """Pre-norm block whose attention stays inside windows."""

    def __init__(self, *, dim: int, num_heads: int, window: Triple, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim=dim, num_heads=num_heads, window=window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim=dim)
        self.drop_path = DropPath(prob=drop_path)

    def forward(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Map [B, T, H, W, D] to the same; nothing looks at unreal frames."""
        x = x + self.drop_path(self._attended(self.norm1(x), frame_mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attended(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        num_clips, *shape = x.shape[:4]
        window, shift = _fitted(shape, self.window, shifted=self.shifted)
        padded = [length + -length % size for length, size in zip(shape, window, strict=True)]
        x = F.pad(x, (0, 0, *(n for axis in (2, 1, 0) for n in (0, padded[axis] - shape[axis]))))
        x = torch.roll(x, [-s for s in shift], dims=(1, 2, 3))
        windows = rearrange(x, _SPLIT, **_sizes(window))  # [B*G, N, D]
        mask = _mask(tuple(shape), window, shift, x.device)  # [G, N, N]
        mask = repeat(mask, "g n m -> (b g) 1 n m", b=num_clips)
        if frame_mask is not None:
            mask = mask & self._real(frame_mask, padded, window, shift)[:, None, None]
        x = rearrange(self.attn(windows, mask, window), _JOIN, b=num_clips, **_counts(padded, window), **_sizes(window))
        x = torch.roll(x, shift, dims=(1, 2, 3))
        return x[:, : shape[0], : shape[1], : shape[2]]

    def _real(self, frame_mask: Tensor, padded: Sequence[int], window: Triple, shift: Triple) -> Tensor:
        """Return [B*G, N] bool: is the frame of a token real?"""
        real = F.pad(frame_mask, (0, padded[0] - frame_mask.shape[1]), value=True).roll(-shift[0], 1)  # see `_mask`
        cells = repeat(real, "b t -> b t h w 1", h=padded[1], w=padded[2])
        return rearrange(cells, _SPLIT, **_sizes(window))[..., 0]


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a bias for each difference of places."""

    def __init__(self, *, dim: int, num_heads: int, window: Triple) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        num_differences = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_differences, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02, a=-0.04, b=0.04)

    def forward(self, x: Tensor, mask: Tensor, window: Triple) -> Tensor:
        """Map [B*G, N, D] to the same; mask [B*G, 1, N, N] bool; `window` is the shape of N, at most the built one."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads).unbind(0)
        places = _differences(window, self.window, x.device)  # [N, N]
        bias = rearrange(self.relative_position_bias_table[places], "n m h -> 1 h n m")
        return self.proj(rearrange(attend(q, k, v, mask=mask, bias=bias), "b h n d -> b n (h d)"))


_SPLIT = "b (gt t) (gh h) (gw w) d -> (b gt gh gw) (t h w) d"
_AXES = ("t", "h", "w")
_JOIN = "(b gt gh gw) (t h w) d -> b (gt t) (gh h) (gw w) d"


def _sizes(window: Triple) -> dict[str, int]:
    return dict(zip(_AXES, window, strict=True))


def _counts(padded: Sequence[int], window: Triple) -> dict[str, int]:
    return {f"g{axis}": n // size for axis, n, size in zip(_AXES, padded, window, strict=True)}


def _fitted(shape: Sequence[int], window: Triple, *, shifted: bool) -> tuple[Triple, Triple]:
    """Return the window and its shift on a grid: an axis that fits into one window is not shifted."""
    fitted = tuple(min(size, length) for size, length in zip(window, shape, strict=True))
    shift = tuple(size // 2 if shifted and length > size else 0 for size, length in zip(window, shape, strict=True))
    return fitted, shift  # type: ignore[return-value]


@lru_cache(maxsize=256)
def _mask(shape: Triple, window: Triple, shift: Triple, device: torch.device) -> Tensor:
    """Return [G, N, N] bool: tokens that the shift brought together from two ends of the grid do not see each other.

    Cells that only fill the last window are seen, as in the published code.
    """
    region = torch.zeros(1, *(n + -n % size for n, size in zip(shape, window, strict=True)), 1, dtype=torch.int64)
    for axis, (size, offset) in enumerate(zip(window, shift, strict=True)):
        length = region.shape[axis + 1]
        places = torch.arange(length)
        part = (places >= length - size).long() + (places >= length - offset).long() if offset else places * 0
        region = 3 * region + part.view([-1 if a == axis + 1 else 1 for a in range(5)])
    windows = rearrange(region, _SPLIT, **_sizes(window))[..., 0]  # [G, N]
    return (windows[:, :, None] == windows[:, None]).to(device)


@lru_cache(maxsize=64)
def _differences(window: Triple, built: Triple, device: torch.device) -> Tensor:
    """Return [N, N]: the row of the bias table for two places of a window."""
    axes = torch.meshgrid(*(torch.arange(size) for size in window), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes])  # [3, N]
    apart = places[:, :, None] - places[:, None]  # [3, N, N]
    row = torch.zeros(apart.shape[1:], dtype=torch.int64)
    for axis, size in zip(apart, built, strict=True):
        row = row * (2 * size - 1) + axis + size - 1
    return row.to(device)
