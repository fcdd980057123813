"""Draw a scene of the embedded world and encode it as H.264.

    scene --tracks--> shapes by signed distance on a drifting texture, + noise --> uint8 [T, H, W, 3] --> mp4 bytes

Axes: T frames, C colours, H W pixels, K pixels of the square patch around an object. All draws come from the scene's
key, from streams of their own, so that the background knows nothing of the events.
"""

import io
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from einops import rearrange

from vlp.data.rng import generator
from vlp.data.scene import KEEP_OUT, Scene, Track, tracks
from vlp.data.soundtrack import RATE

NOISE = 3.0  # standard deviation of the sensor noise, in 0..255
_X264 = "mbtree=0"  # with B-frames and small pictures, mbtree reads memory that nobody wrote: bytes would vary
_DRIFT = 0.07  # the furthest that a background moves in one clip, as a fraction of the frame
_OUTLINE = 0.13  # of the radius
_SHADOW = (0.13, 0.18, 0.32)  # offset to the right and down in radii, and strength

Field = np.ndarray  # float32 [H, W] in 0..1


def render(scene: Scene, *, size: int = 128, num_frames: int = 32) -> np.ndarray:
    """Return the clip as uint8 [T, H, W, 3] with H = W = `size` pixels. The same scene gives the same pixels.

    Raises ValueError as `check_shape` does.
    """
    check_shape(size=size, num_frames=num_frames)
    layers = [_layer(track, size) for track in tracks(scene, num_frames)]
    clip = np.empty((num_frames, size, size, 3), dtype=np.uint8)
    # Frame by frame, colours first: what is worked on fits into a core's cache, and inner loops are long.
    pictures = zip(_background(scene.key, num_frames, size), _noise(scene.key, num_frames, size), strict=True)
    for frame, (picture, noise) in enumerate(pictures):
        for layer in layers:
            _paint(picture, layer, frame)
        picture += noise
        np.clip(picture, 0, 255, out=picture)
        clip[frame] = rearrange(picture, "colours height width -> height width colours")
    return clip


def check_shape(*, size: int, num_frames: int) -> None:
    """Raise ValueError when `size` is odd (H.264 stores colour at half size) or below 32, or `num_frames` below 2."""
    if size < 32 or size % 2:
        raise ValueError(f"size={size} cannot be rendered; use an even number of pixels of at least 32.")
    if num_frames < 2:
        raise ValueError(f"num_frames={num_frames} shows no time; use at least 2.")


def encode_h264(frames: np.ndarray, *, fps: float, sound: np.ndarray | None = None) -> bytes:
    """Return uint8 frames [T, H, W, 3] as an mp4 file; equal bytes for equal frames on one machine.

    `sound` [N] in -1..1, at the rate of `vlp.data.soundtrack`, becomes a track of AAC.
    """
    target = io.BytesIO()
    # No dates or version tags in the container, so that the digest of a shard can be reproduced.
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"preset": "veryfast", "crf": "26", "g": "12", "bf": "2", "x264-params": _X264}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        track = None if sound is None else container.add_stream("aac", rate=RATE, layout="mono")
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            container.mux(track.encode(frame))
            container.mux(track.encode())
    return target.getvalue()


def grey(frames: np.ndarray) -> np.ndarray:
    """Return uint8 frames [T, H, W, 3] whose three colours are the mean of what they were."""
    return np.repeat(frames.mean(-1, keepdims=True).round().astype(np.uint8), 3, axis=-1)


def _background(key: int, num_frames: int, size: int) -> Iterator[np.ndarray]:
    """Yield T pictures [C, H, W] float32 of a muted texture that drifts slowly in a direction of its own."""
    rng = generator(key, "background")
    pad = int(np.ceil(_DRIFT * size)) + 2
    field = TEXTURES[int(rng.integers(len(TEXTURES)))](rng, size + 2 * pad, size)
    low, high = (tone[:, None, None] for tone in _two_tones(rng))  # [C, 1, 1]
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1) * _DRIFT * size
    path = (np.linspace(-0.5, 0.5, num_frames) * length)[:, None] * [np.sin(angle), np.cos(angle)] + pad  # [T, 2]
    for top, left in path:
        yield low + _window(field, float(top), float(left), size) * (high - low)


def _two_tones(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return two greyish colours [3] float32, a little apart, and far from every object's colour."""
    level = rng.uniform(96, 138)
    tint = rng.normal(0, 1, (2, 3))
    tint = (tint - tint.mean(1, keepdims=True)) / np.abs(tint - tint.mean(1, keepdims=True)).max(1, keepdims=True)
    step = rng.uniform(12, 22) * rng.choice([-1, 1])
    low, high = (level + sign * step + rng.uniform(6, 18) * tint[row] for row, sign in enumerate((-1, 1)))
    return low.astype(np.float32), high.astype(np.float32)


def _window(field: Field, top: float, left: float, size: int) -> Field:
    """Cut a size x size window at a fractional place, by linear interpolation."""
    row, column = int(top), int(left)
    down, across = np.float32(top - row), np.float32(left - column)
    rows = field[row : row + size] * (1 - down) + field[row + 1 : row + size + 1] * down
    return rows[:, column : column + size] * (1 - across) + rows[:, column + 1 : column + size + 1] * across


def _noise(key: int, num_frames: int, size: int) -> Iterator[np.ndarray]:
    """Yield T times sensor noise [H, W]: windows of one noise image at random places, much faster than fresh noise."""
    rng = generator(key, "noise")
    image = rng.standard_normal((2 * size, 2 * size), dtype=np.float32) * np.float32(NOISE)
    for top, left in rng.integers(0, size, (num_frames, 2)):
        yield image[top : top + size, left : left + size]


def _axes(side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return y [H, 1] and x [1, W] of pixel centres, in frames."""
    line = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return line[:, None], line[None, :]


def _gradient(rng: np.random.Generator, side: int, size: int) -> Field:
    y, x = _axes(side, size)
    angle = rng.uniform(0, 2 * np.pi)
    return (0.5 + 0.55 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))).astype(np.float32)


def _stripes(rng: np.random.Generator, side: int, size: int) -> Field:
    y, x = _axes(side, size)
    angle, wavelength = rng.uniform(0, np.pi), rng.uniform(0.12, 0.3)
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + rng.uniform(0, 2 * np.pi))
    return (0.5 + 0.5 * np.tanh(2 * wave)).astype(np.float32)


def _checker(rng: np.random.Generator, side: int, size: int) -> Field:
    y, x = _axes(side, size)
    angle, wavelength = rng.uniform(0, np.pi / 2), rng.uniform(0.2, 0.4)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    waves = np.sin(2 * np.pi * along / wavelength) * np.sin(2 * np.pi * across / wavelength)
    return (0.5 + 0.5 * np.tanh(5 * waves)).astype(np.float32)


def _blotches(rng: np.random.Generator, side: int, size: int) -> Field:
    """Add up wide soft spots."""
    y, x = _axes(side, size)
    total = np.zeros((side, side))
    for _ in range(14):
        (top, left), width = rng.uniform(-0.1, 1.2, 2), rng.uniform(0.08, 0.2)
        spot = np.exp(-((y - top) ** 2) / (2 * width**2)) * np.exp(-((x - left) ** 2) / (2 * width**2))  # separable
        total += rng.choice([-1, 1]) * spot
    return (0.5 + 0.5 * np.tanh(1.6 * total)).astype(np.float32)


def _ripples(rng: np.random.Generator, side: int, size: int) -> Field:
    y, x = _axes(side, size)
    (top, left), wavelength = rng.uniform(-0.3, 1.3, 2), rng.uniform(0.14, 0.32)
    return (0.5 + 0.5 * np.sin(2 * np.pi * np.hypot(y - top, x - left) / wavelength)).astype(np.float32)


TEXTURES: tuple[Callable[[np.random.Generator, int, int], Field], ...] = (
    _gradient,
    _stripes,
    _checker,
    _blotches,
    _ripples,
)


class _Layer(NamedTuple):
    """An object with its shadow and outline, in a square patch of each frame."""

    corners: np.ndarray  # [T, 2] int, top and left pixel of the patch
    body: np.ndarray  # [T, K, K] float32, how much of a pixel the object covers
    shadow: np.ndarray  # [T, K, K]
    shade: np.ndarray  # [T, K, K], brightness
    rgb: np.ndarray  # [T, 3]


def _layer(track: Track, size: int) -> _Layer:
    reach = (KEEP_OUT + _SHADOW[1]) * float(track.radius.max()) * size + 2
    side = min(size, 2 * int(np.ceil(reach)))
    centres = np.stack([track.y, track.x], 1) * size  # [T, 2] pixels
    corners = np.clip(np.round(centres - side / 2), 0, size - side).astype(int)  # [T, 2]
    radius = (track.radius * size).astype(np.float32)[:, None, None]  # [T, 1, 1] pixels
    from_centre = (corners - centres)[..., None] + np.arange(side) + 0.5  # [T, 2, K] pixels
    y, x = from_centre.astype(np.float32)[:, 0, :, None] / radius, from_centre.astype(np.float32)[:, 1, None] / radius
    inside = _distance(track, x, y)  # [T, K, K] radii, negative inside
    shadow = np.clip(0.5 - 2 * _distance(track, x - _SHADOW[0], y - _SHADOW[1]), 0, 1) * np.float32(_SHADOW[2])
    body = np.clip(0.5 - inside * radius, 0, 1)  # an edge one pixel wide
    rim = np.clip(0.5 + (inside + np.float32(_OUTLINE)) * radius, 0, 1)
    shade = np.float32(1.06) - np.float32(0.1) * y - np.float32(0.42) * rim  # lit from above, darker at the rim
    alpha = track.alpha.astype(np.float32)[:, None, None]
    return _Layer(corners, body * alpha, shadow * alpha, shade, track.rgb.astype(np.float32))


def _paint(picture: np.ndarray, layer: _Layer, frame: int) -> None:
    """Paint an object over a picture [C, H, W], in place."""
    (top, left), side = layer.corners[frame], layer.body.shape[1]
    patch = picture[:, top : top + side, left : left + side]  # [C, K, K]
    patch *= 1 - layer.shadow[frame]
    patch += layer.body[frame] * (np.minimum(layer.rgb[frame, :, None, None] * layer.shade[frame], 255) - patch)


def _distance(track: Track, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance [T, K, K] to the tilted shape; it, x [T, 1, K] and y [T, K, 1] are in radii."""
    cos, sin = np.float32(np.cos(track.tilt)), np.float32(np.sin(track.tilt))
    return SHAPES[track.shape](x * cos + y * sin, y * cos - x * sin)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1.0


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.6


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fold the plane into one half of one of the five tips; its edge is one line."""
    half = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + np.float32(half)) % np.float32(2 * half) - np.float32(half))
    tip, notch = 1.22, 0.55
    edge_x, edge_y = notch * np.cos(half) - tip, notch * np.sin(half)
    away = np.hypot(x, y)
    return (edge_y * (away * np.cos(angle) - tip) - edge_x * away * np.sin(angle)) / np.hypot(edge_x, edge_y)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide, high = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(wide - 1.08, high - 0.36), np.maximum(wide - 0.36, high - 1.08))


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.78) - 0.27


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Join a square that stands on its corner with circles on its two upper edges."""
    x, y = np.abs(x), y - 0.12
    corner = (x + np.abs(y) - 0.86) / np.sqrt(2)
    return np.minimum(corner, np.hypot(x - 0.43, y + 0.43) - 0.608)


SHAPES = {
    **{"circle": _circle, "square": _square, "triangle": _triangle, "star": _star},
    **{"cross": _cross, "ring": _ring, "heart": _heart},
}
