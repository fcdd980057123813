"""One transformer for words and frames: a ViT whose sequence is a frame with the text behind it.

Axes: B clips, T frames, L text length, S patches of a frame, N = L + 1 + S tokens of a frame's sequence, D width.
A timm ViT's parameters keep their names.
"""

from typing import Any, Protocol

import torch
from einops import rearrange, repeat
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlp.encoders.timm_model import image_model
from vlp.layers.block import init_linears
from vlp.layers.pool import masked_mean
from vlp.layers.position import LearnedPositions
from vlp.types import Fused, Grid, Tokens


class Mixing(Protocol):
    """How the frames of a clip exchange before each block."""

    def __call__(self, visual: Tensor) -> Tensor:
        """Map the visual tokens [B, T, 1 + S, D], class token first, to the same shape."""
        ...


class RollTokens:
    """A share of each frame's tokens comes from the frame before, as many from the frame after, in a circle.

    No parameter, no arithmetic; T applications restore a clip of T frames. Source: arXiv:2203.07303, 3.2.

    Args:
        share: of the visual tokens that come from each side, counted with the class token and rounded down.
    """

    def __init__(self, *, share: float = 0.125) -> None:
        if not 0 < share <= 0.5:
            raise ValueError(f"share={share} must be above 0 and at most 0.5: both sides together are all tokens.")
        self.share = share

    def __call__(self, visual: Tensor) -> Tensor:
        """Map [B, T, 1 + S, D] to the same; the class token stays."""
        fold = int(visual.shape[2] * self.share)
        if fold == 0 or visual.shape[1] == 1:
            return visual
        before, rest, after = visual[:, :, 1 : 1 + fold], visual[:, :, 1 + fold : -fold], visual[:, :, -fold:]
        return torch.cat([visual[:, :, :1], before.roll(1, 1), rest, after.roll(-1, 1)], dim=2)


class NoMixing:
    """Frames stay alone; only the words, averaged at the end, see them all."""

    def __call__(self, visual: Tensor) -> Tensor:
        return visual


class SingleStream(nn.Module):
    """A ViT over [words; class token; patches] of each frame; the words' copies are averaged at the end.

    Either side may be missing: a video alone is not mixed over time, which keeps it an image model.

    Args:
        name: a timm VisionTransformer with a class token. num_frames: rows of the table of times.
        size: pixels a side. vocab_size, max_length, pad_id: of the text. mixing: RollTokens or NoMixing.
        shuffle_patches: the patches of each frame in a random order, a new one each time, as the published weights saw
            them in training and evaluation; the paper describes fixed places.
        See `vlp.encoders.timm_model.image_model` for the others.

    Source: arXiv:2203.07303, 3.
    """

    def __init__(
        self,
        *,
        name: str,
        num_frames: int,
        size: int,
        vocab_size: int,
        max_length: int,
        pad_id: int,
        mixing: Mixing,
        shuffle_patches: bool = False,
        checkpoint_path: str | None = None,
        overrides: dict[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        model: Any = image_model(
            name, size=size, pretrained=False, checkpoint_path=checkpoint_path, overrides=overrides, drop_path=0.0
        )
        _check(model, name)
        self.dim: int = model.embed_dim
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.tubelet_size, self.size, self.num_frames = 1, size, num_frames
        self.mixing, self.shuffle_patches = mixing, shuffle_patches
        self.words = nn.Embedding(vocab_size, self.dim, padding_idx=pad_id)
        self.word_positions = LearnedPositions(length=max_length, dim=self.dim)
        self.word_norm = nn.LayerNorm(self.dim, eps=1e-12)
        self.types = nn.Embedding(2, self.dim)  # 0 text, 1 image
        self.drop = nn.Dropout(dropout)
        init_linears(nn.ModuleList([self.words, self.types]))
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed
        self.time_positions = LearnedPositions(length=num_frames, dim=self.dim, std=0.0)
        self.blocks, self.norm = model.blocks, model.norm

    def forward(
        self, text_ids: Tensor | None, text_mask: Tensor | None, pixels: Tensor | None, frame_mask: Tensor | None
    ) -> Fused:
        """Read words, a clip, or both.

        Args:
            text_ids: [B, L] int64 under text_mask [B, L] bool. pixels: [B, T, 3, H, W] float under frame_mask [B, T].

        Returns:
            Fused: the text [B, L, D], of no words where there is no text; the video as a grid [B, T, h, w, D] with a
            class token a frame, None where there is none.
        """
        words = None if text_ids is None else self._words(text_ids)
        visual = None if pixels is None else self._visual(pixels)
        if visual is None:
            assert words is not None and text_mask is not None, "a pass over nothing"
            return Fused(Tokens(self._alone(words, text_mask), text_mask), None)
        assert pixels is not None
        num_clips, num_frames = visual.shape[:2]
        frame_mask = visual.new_ones(num_clips, num_frames).bool() if frame_mask is None else frame_mask
        if words is None:
            text, mask = visual.new_zeros(num_clips, 0, self.dim), frame_mask.new_zeros(num_clips, 0)
        else:
            assert text_mask is not None
            text, mask = words, text_mask
        text, visual = self._together(text, mask, visual, frame_mask, mixed=words is not None)
        height = pixels.shape[3] // self.patch_size
        cells = rearrange(visual[:, :, 1:], "b t (h w) d -> b t h w d", h=height)
        return Fused(Tokens(text, mask), Grid(cells, frame_mask, visual[:, :, 0]))

    def _words(self, text_ids: Tensor) -> Tensor:
        """Embed [B, L] to [B, L, D]."""
        words = self.drop(self.word_norm(self.word_positions(self.words(text_ids))))
        return words + self.types(torch.zeros_like(text_ids))

    def _visual(self, pixels: Tensor) -> Tensor:
        """Embed clips to [B, T, 1 + S, D], class token first."""
        num_clips, num_frames = pixels.shape[:2]
        patches = self.patch_embed(rearrange(pixels, "b t c h w -> (b t) c h w"))
        patches = rearrange(patches, "(b t) s d -> b t s d", t=num_frames) + self.pos_embed[:, None, 1:]
        patches = self.time_positions(patches)
        if self.shuffle_patches:
            order = torch.rand(patches.shape[:3], device=pixels.device).argsort(2)
            patches = patches.take_along_dim(order[..., None], dim=2)
        classes = (self.cls_token + self.pos_embed[:, :1]).expand(num_clips, num_frames, -1, -1)
        visual = self.drop(torch.cat([classes, patches], dim=2))
        return visual + self.types(torch.ones(visual.shape[:3], dtype=torch.int64, device=pixels.device))

    def _alone(self, words: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            words = block(words, attn_mask=mask)
        return self.norm(words)

    def _together(
        self, text: Tensor, text_mask: Tensor, visual: Tensor, frame_mask: Tensor, *, mixed: bool
    ) -> tuple[Tensor, Tensor]:
        """Run all blocks over [B*T, L + 1 + S, D]; return the text's mean over real frames and the visual tokens."""
        num_frames, length = visual.shape[1], text.shape[1]
        text = repeat(text, "b l d -> b t l d", t=num_frames)
        seen = torch.cat([text_mask, text_mask.new_ones(len(text_mask), visual.shape[2])], dim=1)
        seen = repeat(seen, "b n -> (b t) n", t=num_frames)
        for block in self.blocks:
            visual = self.mixing(visual) if mixed else visual
            x = rearrange(torch.cat([text, visual], dim=2), "b t n d -> (b t) n d")
            x = rearrange(block(x, attn_mask=seen), "(b t) n d -> b t n d", t=num_frames)
            text, visual = x[:, :, :length], x[:, :, length:]
        text = masked_mean(rearrange(self.norm(text), "b t l d -> b t (l d)"), frame_mask)
        return rearrange(text, "b (l d) -> b l d", l=length, d=self.dim), self.norm(visual)


def _check(model: nn.Module, name: str) -> None:
    if type(model) is not VisionTransformer or not model.has_class_token or model.num_prefix_tokens != 1:
        raise ValueError(f"'{name}' is no timm VisionTransformer with one class token, which SingleStream needs.")
