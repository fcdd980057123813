"""A visual tokenizer whose codes were learned against texts: the targets of masked modelling.

    frames --encoder--> grid [B, T, h, w, D] --quantizer--> codes [B, T, h, w]

Axes: B clips, T frames, h w cells, D width, N vectors, E width of a code.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.encoders.codebook import k_means
from vlp.layers.pixels import normalised, pixel_affine
from vlp.layers.quantize import Quantizer


class SemanticCodes(nn.Module):
    """The video side of `vlp.models.tokenizer`, under the same names: its checkpoint is what this starts from.

    Args:
        encoder: (pixels, frame_mask, hidden) -> Grid. num_codes, code_dim: of the quantizer.
        mean, std: of the pixels, in [0, 1], per channel.
    """

    fitted: Tensor
    pixel_affine: Tensor

    def __init__(
        self,
        *,
        encoder: nn.Module,
        num_codes: int,
        code_dim: int = 32,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.video_encoder = encoder
        self.quantizer = Quantizer(dim=int(encoder.dim), num_codes=num_codes, code_dim=code_dim)  # type: ignore[arg-type]
        self.num_codes = num_codes
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("pixel_affine", pixel_affine(mean, std), persistent=False)

    def fit(self, frames: Iterable[Tensor], *, seed: int) -> None:
        """Spread the codes over what an encoder that nobody has trained sees; a trained tokenizer is fitted already."""
        clips = (normalised(each, self.pixel_affine) for each in frames)
        fit_codes(self.video_encoder, self.quantizer, clips, seed=seed)
        self.fitted.fill_(True)

    @torch.no_grad()
    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Map [B, T, H, W, 3] uint8 under [B, T] bool (True = real) to codes [B, T, h, w] int64."""
        pixels = normalised(frames, self.pixel_affine)
        return self.quantizer(self.video_encoder(pixels, frame_mask, None).x).codes


@torch.no_grad()
def fit_codes(
    encoder: nn.Module, quantizer: Quantizer, clips: Iterable[Tensor], *, seed: int, max_vectors: int = 100_000
) -> None:
    """Put the middle of all cells at zero, and the codes where their directions are, by k-means.

    What an untrained encoder says of different cells points almost one way: without the first, all codes would be one
    before the texts have told them apart. Codes that are far from all vectors are never chosen, nor trained.

    Args:
        clips: pixels [B, T, 3, H, W]; read until there are `max_vectors` cells.
    """
    was_training = encoder.training
    encoder.eval()
    parts, count = [], 0
    for pixels in clips:
        everywhere = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
        parts.append(quantizer.down(encoder(pixels, everywhere, None).x).float().flatten(0, 3).cpu())  # [N, E]
        count += len(parts[-1])
        if count >= max_vectors:
            break
    encoder.train(was_training)
    cells = torch.cat(parts)[:max_vectors]
    middle = cells.mean(0)
    quantizer.down.bias.sub_(middle)
    vectors = F.normalize(cells - middle, dim=-1)
    centroids = k_means(vectors, quantizer.num_codes, 20, torch.Generator().manual_seed(seed))
    quantizer.place(F.normalize(centroids, dim=-1))
