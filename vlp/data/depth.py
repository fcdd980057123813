"""Pictures of distance: one channel of 16 bits, in millimetres as depth cameras and estimators write them.

T wanted times, H W pixels.
"""

import numpy as np
from av.error import FFmpegError

from vlp.data.container import container_format, first_video, open_container
from vlp.data.decode import Decoded, DecodeError, Pictures
from vlp.data.probe import LIMITS
from vlp.data.transforms import resize
from vlp.types import Reason

_PNG_DEPTH = 24  # where a PNG says how many bits a sample has, and then what its channels are
_GREY = 0


class Depth:
    """16-bit grey images, `most` or more is white; all else (8-bit images, videos) is decoded as it is.

    Args:
        most: the value of the furthest distance that is told apart, in the unit of the pixels.

    Source: the released code of arXiv:2310.01852, where 10 m are white.
    """

    height = width = None  # those of the pictures

    def __init__(self, *, most: float = 10_000.0) -> None:
        if not most > 0:
            raise ValueError(f"most={most} must be above 0.")
        self.most, self.pictures = most, Pictures()

    def __call__(
        self, data: bytes, times_s: np.ndarray, *, short_side: int | None, key_frames: np.ndarray | None = None
    ) -> Decoded:
        """Return frames as `vlp.data.decode.decode` does, uint8 [T, H, W, 3] of three equal colours."""
        if container_format(data) != "png_pipe" or data[_PNG_DEPTH : _PNG_DEPTH + 2] != bytes([16, _GREY]):
            return self.pictures(data, times_s, short_side=short_side, key_frames=key_frames)
        try:
            picture = self._scaled(_sixteen_bits(data), short_side)
        except FFmpegError as error:
            raise DecodeError(Reason.VIDEO_BROKEN, str(error)) from error
        return Decoded(np.repeat(picture[None], len(times_s), axis=0), np.zeros(len(times_s)))

    def _scaled(self, values: np.ndarray, short_side: int | None) -> np.ndarray:
        """Return [H, W] of any unit as uint8 [H, W, 3] whose shorter side has `short_side` pixels."""
        grey = (values.astype(np.float32) * (255 / self.most)).round().clip(0, 255).astype(np.uint8)
        picture = np.repeat(grey[..., None], 3, axis=-1)
        ratio = short_side / min(picture.shape[:2]) if short_side else 1
        height, width = (round(side * ratio) for side in picture.shape[:2])
        return resize(picture[None], height, width)[0]


def _sixteen_bits(data: bytes) -> np.ndarray:
    """Return the pixels [H, W] uint16 of a grey PNG."""
    with open_container(data, "png_pipe", decode_to_probe=True, max_pixels=LIMITS.max_pixels) as container:
        stream = first_video(container)
        assert stream is not None
        stream.codec_context.options = {"max_pixels": str(LIMITS.max_pixels)}
        frame = next(iter(container.decode(stream)), None)
        if frame is None:
            raise DecodeError(Reason.VIDEO_BROKEN, "no picture can be decoded")
        return frame.reformat(format="gray16le").to_ndarray()
