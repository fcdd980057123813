"""Visual tokenizers: frames -> one code a cell of the encoder's grid, the targets of masked visual modelling.

Axes: B clips, T frames, T' tubelets, U frames of a tubelet, H W pixels, h w cells, N vectors, K codes, E width of them.
Tokenizers are never trained by gradient; their state travels in checkpoints.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlp.encoders.weights import load_exactly, read_weights
from vlp.layers.patch import fill_tubelets

_CHUNK = 16_384  # vectors whose distances to all codes are held at once


class PatchCodebook(nn.Module):
    """Codes by k-means over small pictures of the cells: needs no weights of others, `fit` takes seconds."""

    centroids: Tensor
    fitted: Tensor

    def __init__(
        self,
        *,
        num_codes: int,
        patch_size: int,
        tubelet_size: int = 1,
        picture_size: int = 4,
        contrast: bool = False,
    ) -> None:
        """Make an empty codebook.

        Args:
            num_codes: K.
            patch_size: pixels of a cell of the encoder, its `patch_size`.
            tubelet_size: frames of a cell, the encoder's `tubelet_size`.
            picture_size: a cell is averaged to this many pixels a side, a divisor of `patch_size`.
            contrast: subtract each picture's mean and divide by its deviation, so that codes tell form and not light.
        """
        super().__init__()
        if patch_size % picture_size:
            raise ValueError(f"picture_size={picture_size} does not divide patch_size={patch_size}; choose a divisor.")
        self.num_codes, self.patch_size, self.tubelet_size = num_codes, patch_size, tubelet_size
        self.picture_size, self.contrast = picture_size, contrast
        self.register_buffer("centroids", torch.zeros(num_codes, 3 * tubelet_size * picture_size**2))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._known_fitted = False

    @torch.no_grad()
    def fit(self, frames: Iterable[Tensor], *, seed: int, max_vectors: int = 100_000, num_rounds: int = 20) -> None:
        """Choose the codes by k-means++ and `num_rounds` rounds of Lloyd's algorithm.

        Args:
            frames: clips [B, T, H, W, 3] uint8; read until there are `max_vectors` cells.
            seed: the same clips and seed give the same codes.

        Raises:
            ValueError: the clips hold fewer different cells than codes.
        """
        parts, count = [], 0
        for clips in frames:
            parts.append(self._vectors(clips).flatten(0, 3).cpu())  # [N, E]; on the CPU, so that a seed has one result
            count += len(parts[-1])
            if count >= max_vectors:
                break
        vectors = torch.cat(parts)[:max_vectors] if parts else torch.zeros(0, self.centroids.shape[1])
        generator = torch.Generator().manual_seed(seed)
        self.centroids.copy_(k_means(vectors, self.num_codes, num_rounds, generator))
        self.fitted.fill_(True)

    @torch.no_grad()
    def forward(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Map [B, T, H, W, 3] uint8 under [B, T] bool (True = real) to codes [B, T', h, w] int64.

        Raises:
            RuntimeError: the codebook is empty.
        """
        if not self._known_fitted:  # asked once: reading the buffer waits for the device
            if not self.fitted:
                raise RuntimeError(
                    "PatchCodebook has no codes yet; call fit(clips, seed=0) or load a checkpoint first."
                )
            self._known_fitted = True
        vectors = self._vectors(frames, frame_mask)
        return _nearest(vectors.flatten(0, 3), self.centroids)[0].view(vectors.shape[:4])

    def _vectors(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Return the pictures of all cells, [B, T', h, w, E] in units of the full scale."""
        if frames.shape[2] % self.patch_size or frames.shape[3] % self.patch_size:
            raise ValueError(
                f"frames of {frames.shape[2]} x {frames.shape[3]} pixels do not fill cells of {self.patch_size}; "
                "give the codebook the patch_size of the video encoder."
            )
        num_clips, side = len(frames), self.picture_size
        images = rearrange(frames, "b t h w c -> (b t) c h w").float()
        images = F.avg_pool2d(images, self.patch_size // side) / 255.0
        clips = rearrange(images, "(b t) c h w -> b t c h w", b=num_clips)
        clips, _ = fill_tubelets(clips, frame_mask, self.tubelet_size)
        cells = rearrange(clips, "b (t u) c (h p) (w q) -> b t h w (c u p q)", u=self.tubelet_size, p=side, q=side)
        if self.contrast:
            cells = cells - cells.mean(-1, keepdim=True)
            cells = cells / cells.std(-1, keepdim=True).clamp(min=1 / 255)  # flat cells stay flat
        return cells


class DiscreteVae(nn.Module):
    """The encoder of DALL-E's discrete VAE: one of 8,192 codes for each 8 x 8 pixels. Source: arXiv:2102.12092, 2.1.

    Frames are resized so that its grid is the video encoder's, as in arXiv:2111.12681; of a tubelet, the central frame
    is read. Weights: the tensors of the published encoder as safetensors or a plain state dict, under its own names.
    """

    def __init__(
        self, *, path: str | None, patch_size: int, tubelet_size: int = 1, hidden_dim: int = 256, num_codes: int = 8192
    ) -> None:
        """Build the encoder.

        Args:
            path: local file of weights; null gives random codes, which is of use in tests only, and warns.
            patch_size: pixels of a cell of the video encoder.
            tubelet_size: frames of a cell of the video encoder.
            hidden_dim: width of the first group of layers.
            num_codes: K.
        """
        super().__init__()
        self.patch_size, self.tubelet_size, self.num_codes = patch_size, tubelet_size, num_codes
        self.blocks = _dvae_encoder(hidden_dim, num_codes)
        if path is None:
            warnings.warn("DiscreteVae without weights gives random codes; set path to its weights.", stacklevel=2)
        else:
            weights = {_renamed(name): tensor for name, tensor in read_weights(path).items()}
            load_exactly(self, weights, path)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Map [B, T, H, W, 3] uint8 under [B, T] bool (True = real) to codes [B, T', h, w] int64."""
        height, width = frames.shape[2] // self.patch_size, frames.shape[3] // self.patch_size
        clips, _ = fill_tubelets(rearrange(frames, "b t h w c -> b t c h w"), frame_mask, self.tubelet_size)
        clips = clips[:, self.tubelet_size // 2 :: self.tubelet_size]  # [B, T', C, H, W]
        images = rearrange(clips, "b t c h w -> (b t) c h w").float() / 255.0
        images = F.interpolate(images, (8 * height, 8 * width), mode="bilinear", antialias=True, align_corners=False)
        images = 0.8 * images + 0.1  # the range that it was trained on, for its "logit-Laplace" loss
        with torch.autocast(images.device.type, enabled=False):  # the same targets whatever the precision of the run
            logits = self.blocks(images.to(next(self.parameters()).dtype))  # [B*T', K, h, w]
        return rearrange(logits.argmax(1), "(b t) h w -> b t h w", b=len(frames))


class _DvaeBlock(nn.Module):
    """Four convolutions beside a skip; the residual is scaled by 1 / num_layers^2."""

    def __init__(self, *, in_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        width = out_dim // 4
        self.gain = 1 / num_layers**2
        self.id_path = nn.Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (source, target, kernel) in enumerate(
            [(in_dim, width, 3), (width, width, 3), (width, width, 3), (width, out_dim, 1)], start=1
        ):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = nn.Conv2d(source, target, kernel, padding=kernel // 2)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, h, w] to [N, C_out, h, w]."""
        return self.id_path(x) + self.gain * self.res_path(x)


def _dvae_encoder(hidden_dim: int, num_codes: int) -> nn.Sequential:
    """Return the convolutions from [N, 3, 8h, 8w] to logits [N, K, h, w], under the published names."""
    num_groups, blocks_per_group = 4, 2
    parts: OrderedDict[str, nn.Module] = OrderedDict(input=nn.Conv2d(3, hidden_dim, 7, padding=3))
    in_dim = hidden_dim
    for group in range(num_groups):
        out_dim = hidden_dim * 2**group
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(blocks_per_group):
            layers[f"block_{i + 1}"] = _DvaeBlock(
                in_dim=in_dim, out_dim=out_dim, num_layers=num_groups * blocks_per_group
            )
            in_dim = out_dim
        if group < num_groups - 1:
            layers["pool"] = nn.MaxPool2d(2)
        parts[f"group_{group + 1}"] = nn.Sequential(layers)
    parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(in_dim, num_codes, 1)))
    encoder = nn.Sequential(parts)
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):  # variance is kept, so that random codes differ from cell to cell
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return encoder


def _renamed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ {'w': 'weight', 'b': 'bias'}.get(last, last) }"


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of [N, E] the nearest of [K, E] and the squared distance to it, each [N]."""
    codes, distances = [], []
    centroids = centroids.float()
    norms = centroids.square().sum(1)
    with torch.autocast(vectors.device.type, enabled=False):  # differences of squares need float32
        for chunk in vectors.float().split(_CHUNK):
            distance = norms - 2.0 * chunk @ centroids.T  # [n, K], without the part that all codes share
            best, code = distance.min(1)
            codes.append(code)
            distances.append((best + chunk.square().sum(1)).clamp(min=0.0))
    return torch.cat(codes), torch.cat(distances)


def k_means(vectors: Tensor, num_codes: int, num_rounds: int, generator: torch.Generator) -> Tensor:
    """Return centroids [K, E]; a code that loses all its vectors moves to the vector worst served."""
    num_different = len(vectors.unique(dim=0)) if len(vectors) else 0
    if num_different < num_codes:
        raise ValueError(
            f"the clips hold {num_different} different cells, fewer than num_codes={num_codes}; "
            "fit on more clips or lower num_codes."
        )
    centroids = _spread(vectors, num_codes, generator)
    for _ in range(num_rounds):
        codes, distances = _nearest(vectors, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)
        counts = torch.bincount(codes, minlength=num_codes)
        empty = (counts == 0).nonzero().flatten()
        centroids = sums / counts.clamp(min=1)[:, None]
        centroids[empty] = vectors[distances.topk(len(empty)).indices]
    return centroids


def _spread(vectors: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Draw first centroids by squared distance to those drawn. Source: k-means++, Arthur and Vassilvitskii 2007."""
    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    distances = (vectors - vectors[chosen[0]]).square().sum(1)
    for _ in range(num_codes - 1):
        # Inverse transform on the cumulative sum: torch.multinomial takes at most 2^24 choices.
        point = torch.rand((), generator=generator, dtype=torch.float64) * distances.double().sum()
        chosen.append(int(torch.searchsorted(distances.double().cumsum(0), point).clamp(max=len(vectors) - 1)))
        distances = distances.minimum((vectors - vectors[chosen[-1]]).square().sum(1))
    return vectors[chosen]
