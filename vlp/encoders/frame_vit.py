"""A ViT frame by frame, whose blocks may exchange what they know over time: one class token a frame.

Axes: B clips, T frames, H W pixels, h w grid cells, S = h*w patches of a frame, P prefix tokens, N = P + S, D width.
"""

from typing import Any, Protocol

import torch
from einops import rearrange, repeat
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlp.encoders.timm_model import image_model
from vlp.layers.attention import SelfAttention, silence
from vlp.layers.position import LearnedPositions
from vlp.types import Grid


class TimeExchange(Protocol):
    """How the frames of a clip learn of each other before a block of the image model."""

    def __call__(self, block: nn.Module, *, num_frames: int, dim: int, num_heads: int) -> nn.Module:
        """Return a module (x [B, T, N, D], frame_mask [B, T] bool or None) -> [B, T, N, D]."""
        ...


class NoExchange:
    """Frames stay alone: an image model on every frame."""

    def __call__(self, block: nn.Module, *, num_frames: int, dim: int, num_heads: int) -> nn.Module:
        return AloneBlock(block)


class TokenOverTime:
    """Before each block, every token position attends over time. Source: arXiv:2310.01852, 3.1 (video encoder).

    Its attention and norm start as copies of the block's own, its table of times as N(0, 1/dim).

    Args:
        copy_attention: false starts the attention as a fresh one with an output projection of zero.
    """

    def __init__(self, *, copy_attention: bool = True) -> None:
        self.copy_attention = copy_attention

    def __call__(self, block: nn.Module, *, num_frames: int, dim: int, num_heads: int) -> nn.Module:
        made = TemporalBlock(block, num_frames=num_frames, dim=dim, num_heads=num_heads)
        if self.copy_attention:
            made.copy_from_space()
        return made


class AloneBlock(nn.Module):
    """A block of an image model on every frame."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Map [B, T, N, D] to the same."""
        return rearrange(self.block(rearrange(x, "b t n d -> (b t) n d")), "(b t) n d -> b t n d", t=x.shape[1])


class TemporalBlock(nn.Module):
    """A block of an image model behind an attention over time at each token position, class token included."""

    def __init__(self, block: nn.Module, *, num_frames: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.block = block
        self.temporal_positions = LearnedPositions(length=num_frames, dim=dim, std=0.0)
        nn.init.normal_(self.temporal_positions.table, std=dim**-0.5)
        self.temporal_norm = nn.LayerNorm(dim)
        self.temporal_attn = SelfAttention(dim=dim, num_heads=num_heads)
        silence(self.temporal_attn)

    @torch.no_grad()
    def copy_from_space(self) -> None:
        """Let the attention over time start as that over space."""
        own: Any = self.block
        for mine, source in ((self.temporal_attn.qkv, own.attn.qkv), (self.temporal_attn.proj, own.attn.proj)):
            mine.weight.copy_(source.weight)
            mine.bias.copy_(source.bias)
        self.temporal_norm.load_state_dict(own.norm1.state_dict())
        self.temporal_norm.eps = own.norm1.eps

    def forward(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Map [B, T, N, D] to the same; real frames do not see unreal ones."""
        num_frames, num_tokens = x.shape[1:3]
        if num_frames > 1:  # of a single frame there is no time to tell
            x = self.temporal_positions(x)
        lines = rearrange(self.temporal_norm(x), "b t n d -> (b n) t d")
        mask = None if frame_mask is None else repeat(frame_mask, "b t -> (b n) t", n=num_tokens)
        x = x + rearrange(self.temporal_attn(lines, mask), "(b n) t d -> b t n d", n=num_tokens)
        return rearrange(self.block(rearrange(x, "b t n d -> (b t) n d")), "(b t) n d -> b t n d", t=num_frames)


class FrameVit(nn.Module):
    """A timm VisionTransformer on every frame; its parameters keep timm's names below `blocks.N.block`.

    The prefix holds one class token a frame; what a clip is, is their mean (vlp.layers.pool.ClsPool).
    """

    def __init__(
        self,
        *,
        name: str,
        num_frames: int,
        size: int,
        time: TimeExchange,
        width: int | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        overrides: dict[str, Any] | None = None,
        drop_path: float = 0.0,
        patch_drop: float = 0.0,
    ) -> None:
        """Build the encoder; see `vlp.encoders.timm_model.image_model` for the arguments that it shares.

        Args:
            num_frames: most frames of a clip. size: pixels of a frame from top to bottom. width: from left to right,
                `size` where not given.
            time: NoExchange or TokenOverTime.
            patch_drop: share of the patches that training leaves out, the same places in all frames of a clip.
                Source: arXiv:2212.00794.

        Raises:
            ValueError: the name is no VisionTransformer with a class token; patch_drop is no share.
        """
        super().__init__()
        if not 0 <= patch_drop < 1:
            raise ValueError(f"patch_drop={patch_drop} is not a share; it must be at least 0 and below 1.")
        model: Any = image_model(
            name,
            size=size if width is None else (size, width),
            pretrained=pretrained,
            checkpoint_path=checkpoint_path,
            overrides=overrides,
            drop_path=drop_path,
        )
        _check_class_token(model, name)
        self.dim: int = model.embed_dim
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.tubelet_size, self.size, self.patch_drop = 1, size, patch_drop
        self.patch_embed = model.patch_embed
        self.cls_token: Any = model.cls_token
        self.pos_embed: Any = model.pos_embed
        self.norm_pre, self.norm = model.norm_pre, model.norm
        num_heads = model.blocks[0].attn.num_heads
        self.blocks = nn.ModuleList(
            time(block, num_frames=num_frames, dim=self.dim, num_heads=num_heads) for block in model.blocks
        )

    def forward(self, pixels: Tensor, frame_mask: Tensor | None = None, hidden: Tensor | None = None) -> Grid:
        """Encode clips.

        Args:
            pixels: [B, T, 3, H, W] float, normalised. frame_mask: [B, T] bool, True = real.
            hidden: [B, T, h, w] bool, True = the content of this patch is replaced by zeros after the embedding.

        Returns:
            Grid of [B, T, h, w, D] with prefix [B, T, D]; patches that `patch_drop` left out are zeros.
        """
        num_clips, num_frames = pixels.shape[:2]
        patches = self.patch_embed(rearrange(pixels, "b t c h w -> (b t) c h w"))  # [B*T, S, D]
        patches = rearrange(patches, "(b t) s d -> b t s d", t=num_frames)
        if hidden is not None:
            patches = patches.masked_fill(rearrange(hidden, "b t h w -> b t (h w) 1"), 0.0)
        patches = patches + self.pos_embed[:, None, 1:]
        kept = self._kept(num_clips, patches.shape[2], pixels.device)
        if kept is not None:
            patches = patches.take_along_dim(kept[:, None, :, None], dim=2)
        classes = (self.cls_token + self.pos_embed[:, :1]).expand(num_clips, num_frames, -1, -1)
        x = self.norm_pre(torch.cat([classes, patches], dim=2))  # [B, T, 1 + S, D]
        for block in self.blocks:
            x = block(x, frame_mask)
        x = self.norm(x)
        cells = self._in_place(x[:, :, 1:], kept, pixels.shape[3] // self.patch_size, pixels.shape[4])
        mask = pixels.new_ones(num_clips, num_frames, dtype=torch.bool) if frame_mask is None else frame_mask
        return Grid(cells, mask, x[:, :, 0])

    def _kept(self, num_clips: int, num_patches: int, device: torch.device) -> Tensor | None:
        """Draw the places [B, K] that stay in sight, in order; None where all do."""
        if not self.training or self.patch_drop == 0.0:
            return None
        count = max(1, round(num_patches * (1 - self.patch_drop)))
        return torch.rand(num_clips, num_patches, device=device).topk(count, dim=1).indices.sort(dim=1).values

    def _in_place(self, patches: Tensor, kept: Tensor | None, height: int, pixels_wide: int) -> Tensor:
        """Return the cells [B, T, h, w, D] of patches [B, T, K, D]."""
        if kept is not None:
            num_patches = height * (pixels_wide // self.patch_size)
            places = kept[:, None, :, None].expand_as(patches)
            patches = patches.new_zeros(*patches.shape[:2], num_patches, self.dim).scatter(2, places, patches)
        return rearrange(patches, "b t (h w) d -> b t h w d", h=height)


def _check_class_token(model: nn.Module, name: str) -> None:
    if type(model) is not VisionTransformer or not model.has_class_token or model.num_prefix_tokens != 1:
        raise ValueError(
            f"'{name}' is no timm VisionTransformer with one class token, which FrameVit needs; use TimmFrames."
        )
