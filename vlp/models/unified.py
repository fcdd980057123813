"""The single-stream family: one transformer reads words, frames, or both.

    frames -> pixels -> video (Grid) -> video_embed       the stream over frames alone: contrastive
    text_ids ---------> text (Tokens) -> text_embed       the stream over words alone
    text_ids, pixels -> fused -> fused_text, fused_video  the stream over both: matching, masked words

Axes: B clips, T frames, C channels, H W pixels or cells, L text length, D width, E embedding.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from vlp.forward import quantity
from vlp.layers.pixels import pixel_affine
from vlp.models import shared_space
from vlp.types import Fused, Grid, Tokens


class Unified(nn.Module):
    """One stream for both modalities, and what may stand on it.

    Args:
        stream: (text_ids, text_mask, pixels, frame_mask), each pair may be None -> Fused.
        video_pool, text_pool: Grid or Tokens -> [B, D]. embed_dim: width of the shared space.
        temperature: see vlp.layers.temperature. mean, std: of the pixels, in [0, 1], per channel.
    """

    pixels = shared_space.pixels
    video_embed, text_embed = shared_space.video_embed, shared_space.text_embed
    logit_scale = shared_space.logit_scale

    def __init__(
        self,
        *,
        stream: nn.Module,
        video_pool: nn.Module,
        text_pool: nn.Module,
        embed_dim: int,
        temperature: nn.Module,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.stream = stream
        dim = int(stream.dim)  # type: ignore[arg-type]
        self.video_pool, self.text_pool = video_pool, text_pool
        self.video_projection = nn.Linear(dim, embed_dim, bias=False)
        self.text_projection = nn.Linear(dim, embed_dim, bias=False)
        self.temperature = temperature
        self.register_buffer("pixel_affine", pixel_affine(mean, std), persistent=False)

    @quantity
    def video(self, pixels: Tensor, frame_mask: Tensor) -> Grid:
        """Return the stream over frames alone."""
        return self.stream(None, None, pixels, frame_mask).video

    @quantity
    def text(self, text_ids: Tensor, text_mask: Tensor) -> Tokens:
        """Return the stream over words alone."""
        return self.stream(text_ids, text_mask, None, None).text

    @quantity
    def fused(self, pixels: Tensor, frame_mask: Tensor, text_ids: Tensor, text_mask: Tensor) -> Fused:
        """Let words and frames see each other."""
        return self.stream(text_ids, text_mask, pixels, frame_mask)

    @quantity
    def fused_text(self, fused: Fused) -> Tokens:
        """Return the text side [B, L, D] of the stream."""
        return fused.text

    @quantity
    def fused_video(self, fused: Fused) -> Grid:
        """Return the video side [B, T, H, W, D] of the stream."""
        assert fused.video is not None
        return fused.video

    def shape_errors(self, quantities: set[str]) -> list[str]:
        """Return one line for each pair of parts that do not fit together."""
        pools = {"video_pool": self.video_pool, "text_pool": self.text_pool}
        dim = self.stream.dim
        return [
            f"model.{name}.dim: {pool.dim} does not fit the stream; set it to {dim}."
            for name, pool in pools.items()
            if getattr(pool, "dim", dim) != dim
        ]
