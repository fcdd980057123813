"""Clips for the benches: encoded once, kept under build/bench/, every frame carries its number.

A slow zoom with a moving inset and noise: real motion, so that B-frames differ, at about the bitrate of web video. The
number stands in a row of dark and bright cells at the lower edge, large enough to survive any codec and any scaling.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.filter import Graph
from peers import barcode

from vlp.data.storage import locked

CACHE = Path(__file__).parents[2] / "build" / "bench"
VERSION = 1  # of what is drawn and how it is encoded; another one makes the clips again
FPS = 30
MASTER = 1280, 720
SIZES = {"270p": (480, 270), "256": (456, 256), "720p": (1280, 720)}
GOPS = (12, 30, 250)


class Codec(NamedTuple):
    encoder: str
    container: str
    options: dict[str, str]  # the GOP is written where "{gop}" stands


X265 = "keyint={gop}:bframes=3:pools=1:log-level=none"
CODECS = {
    "h264": Codec("libx264", "mp4", {"preset": "medium", "crf": "26", "g": "{gop}", "bf": "3"}),
    "hevc": Codec("libx265", "mp4", {"preset": "veryfast", "crf": "26", "x265-params": X265}),
    "vp9": Codec("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "6", "crf": "36", "b": "0", "g": "{gop}"}),
    "av1": Codec("libsvtav1", "mp4", {"preset": "10", "crf": "38", "g": "{gop}"}),
}


class Clip(NamedTuple):
    codec: str
    size: str  # one of SIZES
    gop: int
    num_frames: int
    path: Path

    @property
    def name(self) -> str:
        return f"{self.codec} {self.size} GOP {self.gop}"

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height."""
        return SIZES[self.size]


def clips(codecs: tuple[str, ...], sizes: tuple[str, ...], gops: tuple[int, ...], *, num_frames: int) -> list[Clip]:
    """Return the clips of a grid; those that are missing are encoded, two at a time."""
    folder = CACHE / f"clips-v{VERSION}-{num_frames}"
    grid = [
        Clip(codec, size, gop, num_frames, folder / f"{codec}-{size}-g{gop}.{CODECS[codec].container}")
        for codec in codecs
        for size in sizes
        for gop in gops
    ]
    if not all(clip.path.exists() for clip in grid):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(str(folder / "lock")):  # two runs at once make a clip once
            _make([clip for clip in grid if not clip.path.exists()], folder / "master.yuv", num_frames)
    return grid


def _make(missing: list[Clip], master: Path, num_frames: int) -> None:
    if not missing:
        return
    _draw(master, num_frames)
    missing.sort(key=lambda clip: clip.shape, reverse=True)  # the long ones first: the cores end together
    with ProcessPoolExecutor(2) as pool:
        for done, clip in enumerate(pool.map(_encode, missing, repeat(master)), 1):
            print(f"fixtures: {done} of {len(missing)} clips, {clip}", flush=True)
    master.unlink()


def _draw(path: Path, num_frames: int) -> None:
    """Write the frames that all clips are encoded from, yuv420p of MASTER size, one after the other."""
    with open(path, "wb") as file:
        for number, frame in zip(range(num_frames), _pictures(), strict=False):
            planes = frame.to_ndarray()  # [H * 3 / 2, W] uint8
            barcode.write(planes[: MASTER[1]], number)
            planes[MASTER[1] :].reshape(2, -1, MASTER[0] // 2)[:, -MASTER[1] // 20 :] = 128  # no colour under it
            file.write(planes.tobytes())
            if number % 100 == 99:
                print(f"fixtures: {number + 1} of {num_frames} frames drawn", flush=True)


def _pictures() -> Iterator[av.VideoFrame]:
    width, height = MASTER
    graph = Graph()
    zoom = graph.add("mandelbrot", f"size={width // 2}x{height // 2}:rate={FPS}:maxiter=200")
    grown = graph.add("scale", f"{width}:{height}")
    inset = graph.add("testsrc2", f"size={width // 3}x{height // 3}:rate={FPS}")
    over = graph.add("overlay", f"x='{width // 3}*(1+sin(t))':y='{height // 4}*(1+cos(t*1.3))':eval=frame")
    grain = graph.add("noise", "all_strength=3:all_flags=t:all_seed=7")
    shape = graph.add("format", "yuv420p")
    sink = graph.add("buffersink")
    zoom.link_to(grown)
    grown.link_to(over, 0, 0)
    inset.link_to(over, 0, 1)
    for one, other in ((over, grain), (grain, shape), (shape, sink)):
        one.link_to(other)
    graph.configure()
    while True:
        yield sink.pull()


def _encode(clip: Clip, master: Path) -> str:
    """Encode one clip from the master, with one thread."""
    width, height = MASTER
    frames = np.memmap(master, np.uint8, "r").reshape(-1, height * 3 // 2, width)
    codec = CODECS[clip.codec]
    options = {key: value.format(gop=clip.gop) for key, value in codec.options.items()}
    half = clip.path.with_suffix(".part")
    with av.open(str(half), "w", format=codec.container) as output:
        stream = output.add_stream(codec.encoder, rate=FPS, options=options)
        stream.width, stream.height = clip.shape
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, planes in enumerate(frames[: clip.num_frames]):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv420p")
            frame = frame.reformat(*clip.shape, interpolation="AREA")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    half.rename(clip.path)
    return f"{clip.name}: {clip.path.stat().st_size / 1e6:.2f} MB"
