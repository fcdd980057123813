"""The two-tower family: a video encoder and a text encoder, optionally a fusion and a caption decoder.

    frames -> pixels -> encoded -> video (Grid) -> video_embed (unit vector)     two towers: contrastive
                                     |   \\
                                     |    +-> caption_logits                     decoder: captioning
    text_ids ------------> text (Tokens) -> text_embed (unit vector)
                                     |
                         video, text -> fused -> fused_text, fused_video         fusion: matching, masked words

Axes: B clips, T frames or grid steps, C channels, H W pixels or cells, N tokens, L text length, D width, E embedding,
K other texts of a clip.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vlp.forward import quantity
from vlp.fusion.joint_post import JointPostFusion
from vlp.layers.pixels import pixel_affine
from vlp.models import shared_space
from vlp.types import AttentionMass, Fused, Grid, Tokens


class VideoText(nn.Module):
    """Two towers and what may stand on them; a part that no objective uses is dropped before training.

    Args:
        video: video encoder (pixels, frame_mask, hidden) -> Grid. text: text encoder (text_ids, text_mask) -> Tokens.
        connectors: stages Grid -> Grid after the video encoder, by name, in order; each has `in_dim` and `dim`.
        video_pool, text_pool: Grid or Tokens -> [B, D].
        embed_dim: width of the shared space.
        temperature: see vlp.layers.temperature.
        fusion: (Grid, Tokens) -> Fused, or null. decoder: (Grid, text_ids, text_mask) -> logits, or null.
        projection_bias: of both projections.
        project_video: false where a connector projects already, so that frames are pooled in the shared space.
        mean, std: of the pixels, in [0, 1], per channel.
    """

    fusion: Any  # a module, or None; the graph refuses quantities of a part that is left out
    decoder: Any
    pixels = shared_space.pixels
    video_embed, text_embed = shared_space.video_embed, shared_space.text_embed
    logit_scale = shared_space.logit_scale

    def __init__(
        self,
        *,
        video: nn.Module,
        text: nn.Module,
        video_pool: nn.Module,
        text_pool: nn.Module,
        embed_dim: int,
        temperature: nn.Module,
        connectors: Mapping[str, nn.Module | None] | None = None,
        fusion: nn.Module | None = None,
        decoder: nn.Module | None = None,
        project_video: bool = True,
        projection_bias: bool = False,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.video_encoder, self.text_encoder = video, text
        kept = {name: stage for name, stage in (connectors or {}).items() if stage is not None}
        self.connectors = nn.Sequential(OrderedDict(kept))
        self.video_dim: int = _width([video, *self.connectors][-1])
        self.video_pool, self.text_pool = video_pool, text_pool
        self.embed_dim = embed_dim
        projection = nn.Linear(self.video_dim, embed_dim, bias=projection_bias)
        self.video_projection = projection if project_video else nn.Identity()
        self.text_projection = nn.Linear(_width(text), embed_dim, bias=projection_bias)
        self.temperature = temperature
        self.fusion, self.decoder = fusion, decoder
        self.register_buffer("pixel_affine", pixel_affine(mean, std), persistent=False)

    @quantity
    def encoded(self, pixels: Tensor, frame_mask: Tensor, hidden: Tensor | None = None) -> Grid:
        """Return what the video encoder gives; the content of `hidden` cells stays unseen."""
        return self.video_encoder(pixels, frame_mask, hidden)

    @quantity
    def video(self, encoded: Grid) -> Grid:
        """Return the clip as all that follows sees it: the encoder's grid after the connectors."""
        return self.connectors(encoded)

    @quantity
    def text(self, text_ids: Tensor, text_mask: Tensor) -> Tokens:
        """Encode the caption."""
        return self.text_encoder(text_ids, text_mask)

    @quantity
    def more_text(self, more_ids: Tensor, more_mask: Tensor) -> Tokens:
        """Encode the other texts of the clips as [B*K, L, D]."""
        ids, mask = (rearrange(x, "b k l -> (b k) l") for x in (more_ids, more_mask))
        return self.text_encoder(ids, mask)

    @quantity
    def texts_embed(self, text_embed: Tensor, more_text: Tokens) -> Tensor:
        """Return unit vectors [B, 1 + K, E] of all texts of a clip, that of the batch first."""
        more = self.text_embed(more_text)  # [B*K, E]
        return torch.cat([text_embed[:, None], rearrange(more, "(b k) e -> b k e", b=len(text_embed))], dim=1)

    @quantity
    def text_there(self, text_mask: Tensor, more_mask: Tensor) -> Tensor:
        """Return [B, 1 + K] bool: which of the texts of `texts_embed` exist."""
        return torch.cat([text_mask.any(1, keepdim=True), more_mask.any(2)], dim=1)

    @quantity
    def second_embed(self, texts_embed: Tensor) -> Tensor:
        """Return unit vectors [B, E] of the second text of each clip, such as what is said."""
        return texts_embed[:, 1]

    @quantity
    def second_valid(self, text_there: Tensor, valid: Tensor) -> Tensor:
        """Return [B] bool: is there a second text of a real clip?"""
        return valid & text_there[:, 1]

    @quantity
    def more_video(self, more_frames: Tensor, more_frame_mask: Tensor) -> Grid:
        """Encode the other clips of the samples as a Grid of B*K clips."""
        frames, mask = (rearrange(x, "b k ... -> (b k) ...") for x in (more_frames, more_frame_mask))
        return self.connectors(self.video_encoder(self.pixels(frames), mask, None))

    @quantity
    def clips_embed(self, video_embed: Tensor, more_video: Grid) -> Tensor:
        """Return unit vectors [B, 1 + K, E] of all clips of a sample, that of `frames` first."""
        more = self.video_embed(more_video)  # [B*K, E]
        return torch.cat([video_embed[:, None], rearrange(more, "(b k) e -> b k e", b=len(video_embed))], dim=1)

    @quantity
    def second_clip_embed(self, clips_embed: Tensor) -> Tensor:
        """Return unit vectors [B, E] of the second clip of each sample."""
        return clips_embed[:, 1]

    @quantity
    def fused(self, video: Grid, text: Tokens) -> Fused:
        """Let video and text see each other."""
        return self.fusion(video, text)

    @quantity
    def fused_text(self, fused: Fused) -> Tokens:
        """Return the text side [B, L, D] of the fusion."""
        return fused.text

    @quantity
    def fused_video(self, fused: Fused) -> Grid:
        """Return the video side [B, T, H, W, D] of the fusion."""
        assert fused.video is not None, "checked by shape_errors"
        return fused.video

    @quantity
    def fused_more(self, video: Grid, more_ids: Tensor, more_mask: Tensor) -> Tokens:
        """Fuse the clip with each of its other texts: their first tokens [B, K, D], False where there is no text."""
        num_texts, there = more_ids.shape[1], more_mask.any(-1)  # [B, K]
        mask = more_mask.clone()
        mask[..., 0] |= ~there  # attention over nothing is not a number
        ids, mask = (rearrange(x, "b k l -> (b k) l") for x in (more_ids, mask))
        grids = Grid(*(repeat(field, "b ... -> (b k) ...", k=num_texts) for field in video))
        fused = self.fusion(grids, self.text_encoder(ids, mask)).text.x[:, 0]  # [B*K, D]
        return Tokens(rearrange(fused, "(b k) d -> b k d", k=num_texts), there)

    @quantity
    def attention_mass(self, video: Grid, text: Tokens) -> AttentionMass:
        """Return where the attention of the fusion goes."""
        return self.fusion(video, text, True)

    @quantity
    def caption_logits(self, video: Grid, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Return next-token logits [B, L, V] of the caption decoder under teacher forcing."""
        return self.decoder(video, text_ids, text_mask)

    def shape_errors(self, quantities: set[str]) -> list[str]:
        """Return one line for each pair of parts that do not fit together, of those that `quantities` use."""
        widths = {"video": self.video_dim, "text": _width(self.text_encoder)}
        taken = {"fusion": self.fusion if quantities & {"fused", "fused_more"} else None}
        taken["decoder"] = self.decoder if "caption_logits" in quantities else None
        messages = [
            f"{part}.{side}_dim: {getattr(module, f'{side}_dim')} does not fit the {side} features; "
            f"set {part}.{side}_dim={width}, their width."
            for part, module in taken.items()
            for side, width in widths.items()
            if module is not None and getattr(module, f"{side}_dim", width) != width
        ]
        unprojected = isinstance(self.video_projection, nn.Identity) and self.video_dim != self.embed_dim
        if "video_embed" in quantities and unprojected:
            what = f"model.embed_dim: {self.embed_dim} is not the width of the video, which nothing projects"
            messages.append(f"{what}; set it to {self.video_dim}, or model.project_video=true.")
        before = _width(self.video_encoder)
        for name, stage in self.connectors.named_children():
            if stage.in_dim != before:
                what = f"connector.{name}.in_dim: {stage.in_dim}"
                messages.append(f"{what} does not fit what it is given; set it to {before}.")
            before = _width(stage)
        if "attention_mass" in quantities and not isinstance(self.fusion, JointPostFusion):
            messages.append(
                "fusion: this fusion does not tell where its attention goes, which a view reads; choose joint_post."
            )
        if "fused_video" in quantities and not self.fusion.updates_video:
            messages.append(
                "fusion: this fusion gives no video side, which an objective takes as 'fused_video'; "
                "choose fusion=joint or wire that role to 'video'."
            )
        return messages


def _width(part: Any) -> int:
    """Return the width of what an encoder or a connector gives; each has `dim`."""
    return part.dim
