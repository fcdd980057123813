"""How a peer makes a few frames of a video held in memory, [T, H, W, 3] uint8, with one thread."""

from pathlib import Path
from typing import Any

import numpy as np


def torchcodec(data: bytes, times_s: list[float], size: tuple[int, int], mappings: str | None = None) -> Any:
    """Return a torch tensor; `mappings`, the JSON of all frames, saves the exact mode its scan of the file."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    seek: dict[str, Any] = {"custom_frame_mappings": mappings} if mappings else {"seek_mode": "exact"}
    width, height = size
    decoder = VideoDecoder(
        data, dimension_order="NHWC", num_ffmpeg_threads=1, transforms=[Resize((height, width))], **seek
    )
    return decoder.get_frames_played_at(times_s).data


def decord(data: bytes, times_s: list[float], size: tuple[int, int], mappings: str | None = None) -> np.ndarray:
    """Return an array; times become numbers of frames by the average rate, as is common with decord."""
    import io

    from decord import VideoReader

    assert mappings is None
    reader = VideoReader(io.BytesIO(data), width=size[0], height=size[1], num_threads=1)
    rate = reader.get_avg_fps()
    return reader.get_batch([min(int(time_s * rate), len(reader) - 1) for time_s in times_s]).asnumpy()


def read(path: str) -> bytes:
    """Return a file."""
    return Path(path).read_bytes()
