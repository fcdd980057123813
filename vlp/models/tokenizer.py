"""The family that learns a visual tokenizer: a clip is told from others by its codes alone.

    frames -> pixels -> encoded -> quantized -> video (Grid of code vectors) -> video_embed
    text_ids --------> text ------------------------------------------------> text_embed

Axes: B clips, T frames, C channels, H W pixels or cells, L text length, D width, E embedding.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vlp.encoders.semantic import fit_codes
from vlp.forward import quantity
from vlp.layers.pixels import pixel_affine
from vlp.layers.quantize import Quantized, Quantizer
from vlp.models import shared_space
from vlp.types import Grid, Tokens


class SemanticTokenizer(nn.Module):
    """A video encoder with a quantizer, and a text encoder to learn from. Paper-derived, after arXiv:2311.17267.

    Args:
        video: (pixels, frame_mask, hidden) -> Grid. text: (text_ids, text_mask) -> Tokens.
        num_codes, code_dim: of the quantizer. video_pool, text_pool: Grid or Tokens -> [B, D].
        embed_dim: width of the shared space. temperature: see vlp.layers.temperature.
        mean, std: of the pixels, in [0, 1], per channel.
    """

    fitted: Tensor
    pixels = shared_space.pixels
    video_embed, text_embed = shared_space.video_embed, shared_space.text_embed
    logit_scale = shared_space.logit_scale

    def __init__(
        self,
        *,
        video: nn.Module,
        text: nn.Module,
        num_codes: int,
        code_dim: int,
        video_pool: nn.Module,
        text_pool: nn.Module,
        embed_dim: int,
        temperature: nn.Module,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        width, text_width = int(video.dim), int(text.dim)  # type: ignore[arg-type]
        self.video_encoder, self.text_encoder = video, text
        self.quantizer = Quantizer(dim=width, num_codes=num_codes, code_dim=code_dim)
        self.video_pool, self.text_pool = video_pool, text_pool
        self.video_projection = nn.Linear(width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_width, embed_dim, bias=False)
        self.temperature = temperature
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("pixel_affine", pixel_affine(mean, std), persistent=False)

    def fit(self, frames: Iterable[Tensor], *, seed: int) -> None:
        """Start the codes where the untrained encoder puts the cells of training clips."""
        fit_codes(self.video_encoder, self.quantizer, (self.pixels(clips) for clips in frames), seed=seed)
        self.fitted.fill_(True)

    @quantity
    def encoded(self, pixels: Tensor, frame_mask: Tensor) -> Grid:
        """Return what the video encoder gives."""
        return self.video_encoder(pixels, frame_mask, None)

    @quantity
    def encoded_mask(self, encoded: Grid) -> Tensor:
        """Return which times of the grid are real, [B, T] bool."""
        return encoded.mask

    @quantity
    def quantized(self, encoded: Grid) -> Quantized:
        """Return the cells with their codes."""
        return self.quantizer(encoded.x)

    @quantity
    def codes(self, quantized: Quantized) -> Tensor:
        """Return the codes [B, T, H, W] int64."""
        return quantized.codes

    @quantity
    def video(self, encoded: Grid, quantized: Quantized) -> Grid:
        """Return the clip as its codes tell it; no class token passes them by."""
        return Grid(quantized.x, encoded.mask, encoded.prefix[:, :0])

    @quantity
    def text(self, text_ids: Tensor, text_mask: Tensor) -> Tokens:
        """Encode the caption."""
        return self.text_encoder(text_ids, text_mask)

    def shape_errors(self, quantities: set[str]) -> list[str]:
        """Return one line for each pair of parts that do not fit together."""
        sides = {"video": (self.video_pool, self.video_encoder), "text": (self.text_pool, self.text_encoder)}
        return [
            f"model.{side}_pool.dim: {pool.dim} does not fit the {side} encoder; set it to {encoder.dim}."
            for side, (pool, encoder) in sides.items()
            if getattr(pool, "dim", encoder.dim) != encoder.dim
        ]
