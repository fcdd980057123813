"""Augmentations of a clip: every random choice is made once and holds for all its frames, so that motion stays motion.

Each takes and returns uint8 frames [T, H, W, 3]; the output is contiguous. Normalising happens on the device.

T frames, H W pixels, C colours.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601, as torchvision and Pillow weigh it
_YIQ = np.array([_GREY, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32)
_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Cut out one random box and resize it to `size` x `size`; the aspect ratio (width by height) is log-uniform."""

    size: int
    scale_min: float = 0.5  # area of the box as a part of the frame
    scale_max: float = 1.0
    ratio_min: float = 3 / 4
    ratio_max: float = 4 / 3

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_range("scale", self.scale_min, self.scale_max, most=1.0)
        _check_range("ratio", self.ratio_min, self.ratio_max, most=math.inf)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, height, width = self.box(frames.shape[1], frames.shape[2], rng)
        return resize(frames[:, top : top + height, left : left + width], self.size, self.size)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) inside a frame."""
        for _ in range(_ATTEMPTS):
            area = height * width * rng.uniform(self.scale_min, self.scale_max)
            ratio = math.exp(rng.uniform(math.log(self.ratio_min), math.log(self.ratio_max)))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        # A frame much longer than wide rarely holds such a box: take the largest one in its middle.
        w = max(1, min(width, round(height * self.ratio_max)))
        h = max(1, min(height, round(width / self.ratio_min)))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Resize the middle square to `size` x `size`: the short side is kept whole. `rng` is not used.

    `place` moves the square along the long side: 0 is its beginning, 1 its end.
    """

    size: int
    place: float = 0.5

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 <= self.place <= 1:
            raise ValueError(f"place={self.place} must be between 0 and 1; change CenterCrop in the config.")

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        height, width = frames.shape[1:3]
        side = min(height, width)
        top, left = int((height - side) * self.place), int((width - side) * self.place)
        return resize(frames[:, top : top + side, left : left + side], self.size, self.size)


@dataclass(frozen=True, kw_only=True)
class PadToSquare:
    """Resize the long side to `size` and pad the short one evenly with black: nothing is cut off. `rng` is not used."""

    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        num_frames, height, width, _ = frames.shape
        scale = self.size / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (self.size - height) // 2, (self.size - width) // 2
        square = np.zeros((num_frames, self.size, self.size, 3), np.uint8)
        square[:, top : top + height, left : left + width] = resize(frames, height, width)
        return square


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """Mirror the clip with probability `prob`. Captions that say "left" or "right" become wrong."""

    prob: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise ValueError(f"prob={self.prob} must be between 0 and 1; change HorizontalFlip in the config.")

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Ten times faster than a copy by numpy.
        return torch.from_numpy(frames).flip(2).numpy() if rng.random() < self.prob else frames


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue by random amounts.

    The first three are multiplied by a factor drawn from [1 - value, 1 + value], hue turns by up to `hue` of a circle.
    Deviation from torchvision: one linear map of colours, in that order, rounded once at the end (hue in YIQ, not HSV).
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, most in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be between 0 and {most}; change ColorJitter in the config."
                )

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        draw = rng.uniform(-1, 1, 4) * (self.brightness, self.contrast, self.saturation, self.hue)
        brightness, contrast, saturation = 1 + draw[:3]
        matrix = _saturation(saturation) @ _hue(draw[3])  # [C, C], leaves grey as it is
        colors = frames.astype(np.float32)
        # Contrast pulls towards the mean grey of the clip, which brightness has already changed. By torch: numpy's mean
        # takes longer than all the rest.
        mean = brightness * float(torch.from_numpy(colors).mean((0, 1, 2)).numpy() @ _GREY)
        colors = colors @ (brightness * contrast * matrix.T).astype(np.float32)
        colors += np.float32((1 - contrast) * mean + 0.5)  # + 0.5: the cast cuts off, this rounds
        return colors.clip(0, 255, out=colors).astype(np.uint8)


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [T, H, W, 3] with a bilinear filter that covers what a pixel covers (antialias)."""
    if frames.shape[1:3] == (height, width):
        return np.ascontiguousarray(frames)
    # 8 frames 120 x 153 -> 112 x 112, one thread: 0.22 ms this way, 0.25 by torchvision (the same kernel), 1.1 by
    # Pillow (one level apart), 0.7 with a copy to colours first: the fast kernel wants them last in memory.
    video = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> t c h w")
    video = torch.nn.functional.interpolate(video, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(rearrange(video, "t c h w -> t h w c").numpy())


def _saturation(factor: float) -> np.ndarray:
    return factor * np.eye(3) + (1 - factor) * np.tile(_GREY, (3, 1))


def _hue(turns: float) -> np.ndarray:
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    return np.linalg.inv(_YIQ) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size={size} must be at least 1; change clip.size.")


def _check_range(name: str, low: float, high: float, *, most: float) -> None:
    if not 0 < low <= high <= most:
        raise ValueError(
            f"{name}_min={low}, {name}_max={high} must satisfy 0 < min <= max <= {most}; change them in the config."
        )
