"""Video encoders from timm's image models: any backbone frame by frame, or a ViT that attends over space and time.

Axes: B clips, T frames, T' tubelets, H W pixels, h w grid cells, S = h*w patches of a frame, P prefix tokens, D width.
An image is a video of one frame. Fewer frames than `num_frames` use the first rows of the table of times.
"""

from typing import Any

import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlp.encoders.spacetime import TimeMixing
from vlp.encoders.timm_model import image_model
from vlp.layers.patch import CentralFrame, FrameAverage, TubeletEmbed, fill_tubelets, zero_cells
from vlp.layers.position import LearnedPositions, SpacePositions
from vlp.types import Grid


class TimmFrames(nn.Module):
    """Any timm image backbone on every frame; optional tables of time and space tell later layers the place.

    The prefix holds one class token a frame where the backbone has one; registers and distillation tokens stay inside.
    Batch norm in training mode mixes the statistics of all frames, masked ones included; `frozen` avoids that.
    """

    def __init__(
        self,
        *,
        name: str,
        num_frames: int,
        size: int,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        overrides: dict[str, Any] | None = None,
        drop_path: float = 0.0,
        frozen: bool = False,
        time_positions: bool = True,
        space_positions: bool = False,
    ) -> None:
        """Build the backbone; see `vlp.encoders.timm_model.image_model` for the arguments that it shares.

        Args:
            num_frames: most frames of a clip, the rows of the table of times.
            size: height and width of a frame in pixels, a multiple of the backbone's total stride.
            frozen: the backbone gets no gradient and stays in evaluation mode.
            time_positions: add a learned table, zero at first, to all features of a frame.
            space_positions: add a learned table to the cells.
        """
        super().__init__()
        self.backbone = image_model(
            name,
            size=size,
            pretrained=pretrained,
            checkpoint_path=checkpoint_path,
            overrides=overrides,
            drop_path=drop_path,
        )
        model: Any = self.backbone
        self.dim: int = model.num_features
        self.patch_size: int = model.feature_info[-1]["reduction"]
        self.tubelet_size = 1
        self.size, self.frozen = size, frozen
        self._prefix_length: int = getattr(model, "num_prefix_tokens", 0)  # of the backbone's output, all kinds
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.num_prefix = 1 if getattr(model, "cls_token", None) is not None else 0  # a frame
        _, height, width = self.grid(num_frames, size)
        times = LearnedPositions(length=num_frames, dim=self.dim, std=0.0)
        places = SpacePositions(height=height, width=width, dim=self.dim)
        self.time_positions = times if time_positions else nn.Identity()
        self.space_positions = places if space_positions else nn.Identity()
        if frozen:
            self.backbone.requires_grad_(False)
            self.train(self.training)

    def grid(self, num_frames: int, size: int) -> tuple[int, int, int]:
        """Return (T', h, w) for a clip of `num_frames` frames of `size` pixels."""
        return (num_frames, *_cells(size, self.patch_size))

    def train(self, mode: bool = True) -> "TimmFrames":
        """Set training mode, except for a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, pixels: Tensor, frame_mask: Tensor | None = None, hidden: Tensor | None = None) -> Grid:
        """Encode clips.

        Args:
            pixels: [B, T, 3, H, W] float, normalised.
            frame_mask: [B, T] bool, True = real.
            hidden: [B, T, h, w] bool, True = the pixels of this cell are zeroed before the backbone, which may mix
                cells from its first layer on. Source: arXiv:2111.12681, masked visual-token modelling.

        Returns:
            Grid of [B, T, h, w, D] with prefix [B, T, D] or [B, 0, D].
        """
        _check_size(pixels, self.size)
        num_frames = pixels.shape[1]
        if hidden is not None:
            pixels = zero_cells(pixels, hidden)
        cells, cls = self._split(self.backbone(rearrange(pixels, "b t c h w -> (b t) c h w")))
        cells = self.time_positions(rearrange(cells, "(b t) h w d -> b t h w d", t=num_frames))
        prefix = self.time_positions(rearrange(cls, "(b t) p d -> b t p d", t=num_frames))  # [B, T, 0 or 1, D]
        return Grid(self.space_positions(cells), _real(frame_mask, pixels), rearrange(prefix, "b t p d -> b (t p) d"))

    def _split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return cells [B*T, h, w, D] and class tokens [B*T, 0 or 1, D] from whatever layout the backbone has."""
        height, width = _cells(self.size, self.patch_size)
        if features.ndim == 3:
            cells = features[:, self._prefix_length :]
            return rearrange(cells, "n (h w) d -> n h w d", h=height, w=width), features[:, : self.num_prefix]
        cells = features if self._channels_last else rearrange(features, "n d h w -> n h w d")
        return cells, features.new_zeros(features.shape[0], 0, self.dim)


class SpaceTimeVit(nn.Module):
    """A timm VisionTransformer over space and time; parameters of the image model keep timm's names.

    The prefix holds the clip's one class token where the model has one; registers stay inside.
    """

    def __init__(
        self,
        *,
        name: str,
        num_frames: int,
        size: int,
        time: TimeMixing,
        tubelet_size: int = 1,
        inflate: CentralFrame | FrameAverage | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        overrides: dict[str, Any] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        """Build the encoder; see `vlp.encoders.timm_model.image_model` for the arguments that it shares.

        Args:
            num_frames: most frames of a clip.
            size: height and width of a frame in pixels, a multiple of the patch size.
            time: how blocks see time: `vlp.encoders.spacetime.Joint` or `Divided`.
            tubelet_size: frames that one token spans.
            inflate: how a tubelet starts from the image model's patch embedding, CentralFrame where not given.

        Raises:
            ValueError: the name is no plain VisionTransformer, or uses parts that have no meaning over time.
        """
        super().__init__()
        model: Any = image_model(
            name,
            size=size,
            pretrained=pretrained,
            checkpoint_path=checkpoint_path,
            overrides=overrides,
            drop_path=drop_path,
        )
        _check_plain(model, name)
        self.dim: int = model.embed_dim
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.tubelet_size, self.size = tubelet_size, size
        self.num_prefix = 1 if model.has_class_token else 0
        num_tubelets, _, _ = self.grid(num_frames, size)

        self.patch_embed = model.patch_embed
        if tubelet_size > 1:
            self.patch_embed.proj = _inflated(model.patch_embed.proj, tubelet_size, inflate or CentralFrame())
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self._prefix_length: int = model.num_prefix_tokens
        self._prefix_has_place: bool = not model.no_embed_class
        self.time_positions = LearnedPositions(length=num_tubelets, dim=self.dim, std=0.0)
        self.pos_drop, self.norm_pre, self.norm = model.pos_drop, model.norm_pre, model.norm
        num_heads = model.blocks[0].attn.num_heads
        self.blocks = nn.ModuleList(time(block, dim=self.dim, num_heads=num_heads) for block in model.blocks)

    def grid(self, num_frames: int, size: int) -> tuple[int, int, int]:
        """Return (T', h, w) for a clip of `num_frames` frames of `size` pixels."""
        return (-(-num_frames // self.tubelet_size), *_cells(size, self.patch_size))

    def forward(self, pixels: Tensor, frame_mask: Tensor | None = None, hidden: Tensor | None = None) -> Grid:
        """Encode clips.

        Args:
            pixels: [B, T, 3, H, W] float, normalised; a last tubelet that is not full repeats the last frame.
            frame_mask: [B, T] bool, True = real.
            hidden: [B, T', h, w] bool, True = the content of this patch is replaced by zeros after the patch embedding
                and before the positions: a mask token without a parameter.

        Returns:
            Grid of [B, T', h, w, D] with prefix [B, 1, D] or [B, 0, D].
        """
        _check_size(pixels, self.size)
        num_frames = pixels.shape[1]
        patches, frame_mask = self._embed(pixels, frame_mask)  # [B, T', S, D]
        if hidden is not None:
            patches = patches.masked_fill(rearrange(hidden, "b t h w -> b t (h w) 1"), 0.0)
        x = self.norm_pre(self._place(patches))  # [B, P + T'*S, D]
        num_tubelets = patches.shape[1]
        for block in self.blocks:
            x = block(x, frame_mask, self._prefix_length, num_tubelets)
        x = self.norm(x)
        _, height, width = self.grid(num_frames, self.size)
        cells = rearrange(x[:, self._prefix_length :], "b (t h w) d -> b t h w d", t=num_tubelets, h=height, w=width)
        return Grid(cells, _real(frame_mask, cells), x[:, : self.num_prefix])

    def _embed(self, pixels: Tensor, frame_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.tubelet_size == 1:
            patches = self.patch_embed(rearrange(pixels, "b t c h w -> (b t) c h w"))  # [B*T, S, D]
            return rearrange(patches, "(b t) s d -> b t s d", t=pixels.shape[1]), frame_mask
        pixels, frame_mask = fill_tubelets(pixels, frame_mask, self.tubelet_size)
        return self.patch_embed.norm(self.patch_embed.proj(pixels)), frame_mask

    def _place(self, patches: Tensor) -> Tensor:
        """Add positions in space and time to [B, T', S, D], put the prefix in front: [B, P + T'*S, D]."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = [token.expand(patches.shape[0], -1, -1) for token in tokens]
        if self.pos_embed is not None:
            places = self.pos_embed[0]  # [S, D], with rows for the prefix in front in timm's older models
            if prefix and self._prefix_has_place:
                prefix = [torch.cat(prefix, dim=1) + places[: self._prefix_length]]
                places = places[self._prefix_length :]
            patches = patches + places
        cells = rearrange(self.time_positions(patches), "b t s d -> b (t s) d")
        return self.pos_drop(torch.cat([*prefix, cells], dim=1) if prefix else cells)


def _check_plain(model: nn.Module, name: str) -> None:
    if type(model) is not VisionTransformer:
        raise ValueError(
            f"'{name}' is a {type(model).__name__}, but SpaceTimeVit needs a timm VisionTransformer (vit_*, deit_*); "
            "use TimmFrames, which runs any backbone per frame."
        )
    if not isinstance(model.patch_drop, nn.Identity) or model.dynamic_img_size:
        raise ValueError("SpaceTimeVit knows neither patch_drop_rate nor dynamic_img_size; remove them from overrides.")


def _inflated(proj: nn.Module, tubelet_size: int, inflate: CentralFrame | FrameAverage) -> TubeletEmbed:
    """Return the tubelet embedding that starts from the convolution of a patch embedding."""
    assert isinstance(proj, nn.Conv2d)
    embed = TubeletEmbed(
        patch_size=proj.kernel_size[0], tubelet_size=tubelet_size, dim=proj.out_channels, bias=proj.bias is not None
    )
    with torch.no_grad():
        embed.weight.copy_(inflate(proj.weight, tubelet_size))
        if embed.bias is not None and proj.bias is not None:
            embed.bias.copy_(proj.bias)
    return embed


def _cells(size: int, patch_size: int) -> tuple[int, int]:
    if size % patch_size:
        raise ValueError(
            f"size={size} is not a multiple of the encoder's stride of {patch_size} pixels; "
            f"set clip.size to {max(size - size % patch_size, patch_size)}."
        )
    return size // patch_size, size // patch_size


def _check_size(pixels: Tensor, size: int) -> None:
    if tuple(pixels.shape[-2:]) != (size, size):
        raise ValueError(
            f"frames have {pixels.shape[-2]} x {pixels.shape[-1]} pixels, but the encoder was built for {size}; "
            "set clip.size and the transforms to the same size."
        )


def _real(frame_mask: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(like.shape[:2], dtype=torch.bool) if frame_mask is None else frame_mask
