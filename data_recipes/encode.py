"""What is stored of a video: its bytes as they are, a cut and scaled H.264 copy, or a list of JPEG frames.

The list is an mp4 too: a JPEG a frame, with its time. So one member holds them, every tool reads it, and index, limits,
checksum and decoder are those of any video; each frame is a key frame and is reached by one seek.

    bytes --demux from the key frame before the span--> frames --span, rate, size--> x264 --> mp4 --+--> mp4
      \\------------------ sound, packets as they are, see `data_recipes.sound` ------------------/

Times are seconds from the first displayed frame, as in `vlp.data.decode`.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError, InvalidDataError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from data_recipes.sound import has_sound, with_sound, without_sound
from data_recipes.videos import RENAMED, TRANSCODED
from vlp.data.container import container_format, first_video, open_container, read_packets
from vlp.data.decode import TOLERANCE_S, decode
from vlp.data.gop import SEEKABLE, UNTIMED
from vlp.data.probe import LIMITS, ProbeError, VideoFacts, probe
from vlp.data.rows import STILLS
from vlp.types import Reason

_CLOCK = 90_000  # ticks a second of what is written: whole for 24, 25, 30, 60 and the NTSC rates
# Hardly to be told from the original. mbtree reads memory that nobody wrote: bytes would vary, see `vlp.data.render`.
_OPTIONS = {"preset": "fast", "crf": "20", "x264-params": "mbtree=0"}
_MUXER = {"fflags": "+bitexact"}  # no dates or version tags
_MAX_GOP = 60  # frames between key frames where --gop does not say: x264's 250 make single frames dear
_JPEG_QUALITY = 92
_JPEG_OPTIONS = {"qmin": "3", "qmax": "3"}  # of 1 (best) to 31; 2 to 5 is hardly to be told from the original


class Encoding(NamedTuple):
    """What to change of a video. Everything None: as little as possible."""

    short_side: int | None = None  # pixels; smaller videos keep their size
    gop: int | None = None  # frames from one key frame to the next, exactly
    fps: float | None = None  # at most; slower videos keep their rate
    keep_audio: bool = True
    tune: str | None = None  # of x264: "fastdecode" leaves out what makes decoding dear, at some more bytes
    num_frames: int | None = None  # store at most so many evenly spaced frames, each a JPEG of its own, and no sound


class Stored(NamedTuple):
    """What goes into the shard."""

    video: bytes
    extension: str
    facts: VideoFacts
    notes: tuple[str, ...] = ()  # what the user should know, such as "sound lost"


class SpanError(Exception):
    """The span lies outside the video, or is empty."""


class _Shot(NamedTuple):
    """A frame of the result."""

    time_s: float
    frame: VideoFrame


def stored(data: bytes, extension: str, *, span: tuple[float, float] | None, encoding: Encoding) -> Stored:
    """Return what to store of a file: the bytes as they are unless something must change.

    Args:
        data: content of the file.
        extension: of its name, without the dot.
        span: seconds of the part that is wanted; the cut falls on the nearest frames.
        encoding: what to change.

    Raises:
        ProbeError: the file cannot be used; as `vlp.data.probe.probe`.
        SpanError: no part of the video is inside the span.
    """
    extension = RENAMED.get(extension, extension)
    if extension in STILLS:
        return _still(data, extension, encoding.short_side)
    facts = None if extension == "gif" else probe(data)
    unchanged = span is None and encoding._replace(keep_audio=True) == Encoding() and extension not in TRANSCODED
    if encoding.num_frames is not None:
        if facts is None:  # how long a GIF is shown is known when it has been decoded
            return stored(
                stored(data, extension, span=span, encoding=encoding._replace(num_frames=None)).video,
                "mp4",
                span=None,
                encoding=encoding,
            )
        encoding = encoding._replace(keep_audio=False)  # a list of frames has no sound
    if unchanged and (encoding.keep_audio or not has_sound(data)):
        assert facts is not None, "only GIFs are not probed, and they are always changed"
        return Stored(data, extension, facts)
    try:
        silent = without_sound(data) if unchanged else None
        if silent is None:
            start_s, end_s = _clamped(span, facts.duration_s if facts else np.inf)
            silent = _encoded(data, facts, (start_s, end_s), is_cut=span is not None, encoding=encoding)
            if encoding.keep_audio and has_sound(data):
                zero_s = facts.start_s if facts else 0.0
                video, note = with_sound(silent, data, span=(zero_s + start_s, zero_s + end_s))
                return Stored(video, "mp4", probe(video), note)
        return Stored(silent, "mp4", probe(silent))
    except (FFmpegError, OverflowError) as error:
        raise ProbeError(Reason.VIDEO_BROKEN, f"cannot be encoded again: {error}") from error


def _still(data: bytes, extension: str, short_side: int | None) -> Stored:
    facts = probe(data)
    if short_side is None or min(facts.width, facts.height) <= short_side:
        return Stored(data, extension, facts)
    picture = decode(data, np.zeros(1), short_side=short_side).frames[0]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=_JPEG_QUALITY)
    return Stored(file.getvalue(), "jpg", probe(file.getvalue()))


def _encoded(
    data: bytes, facts: VideoFacts | None, span: tuple[float, float], *, is_cut: bool, encoding: Encoding
) -> bytes:
    file, fps = io.BytesIO(), facts.fps if facts else 0.0
    # A cut between two frames falls on the nearer one.
    half_s = 0.5 / fps if fps and is_cut else 0.0
    shots = _inside(_frames(data, facts, start_s=span[0]), span[0] - half_s, span[1] - half_s)
    most = encoding.fps
    if encoding.num_frames is not None:
        most = min(most or np.inf, encoding.num_frames / (span[1] - span[0]))
    if most and (not fps or fps > most * 1.001):
        shots, fps = _at_rate(shots, most, span[1] - span[0]), most
    first = next(shots, None)
    if first is None:
        raise SpanError(f"no frame from {span[0]:g} to {span[1]:g} s")
    with av.open(file, "w", format="mp4", options=_MUXER) as output:
        _write(output, chain([first], shots), first.frame, encoding=encoding, fps=fps or 25.0)
    return file.getvalue()


def _clamped(span: tuple[float, float] | None, duration_s: float) -> tuple[float, float]:
    start_s, end_s = span or (0.0, duration_s)
    if not end_s > start_s or start_s >= duration_s or end_s <= 0:
        raise SpanError(f"{start_s:g} to {end_s:g} s of a video of {duration_s:.2f} s")
    return max(0.0, start_s), min(end_s, duration_s)


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream, str]]:
    kind = container_format(data) or ""
    if data[:6] in (b"GIF87a", b"GIF89a"):
        # The one format that is decoded here and not in training: its decoder runs once, on the user's own download.
        container = av.open(io.BytesIO(data), "r", format="gif", options={"codec_whitelist": "gif"})
    else:
        decode_to_probe = kind not in SEEKABLE
        container = open_container(data, kind, decode_to_probe=decode_to_probe, max_pixels=LIMITS.max_pixels)
    with container:
        stream = first_video(container)
        if stream is None:
            raise ProbeError(Reason.NO_VIDEO_STREAM, "nothing to encode")
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(LIMITS.max_pixels), "strict": "1"}
        yield container, stream, kind


def _frames(data: bytes, facts: VideoFacts | None, *, start_s: float) -> Iterator[_Shot]:
    """Yield the displayed frames from `start_s` on, and perhaps some before it."""
    zero_s = facts.start_s if facts else None
    if facts and start_s > 1:
        shots = _decoded(data, zero_s, seek_s=start_s)
        first = next(shots, None)
        if first and first.time_s <= start_s:  # the seek landed where it should
            yield first
            yield from shots
            return
    yield from _decoded(data, zero_s, seek_s=None)


def _decoded(data: bytes, zero_s: float | None, *, seek_s: float | None) -> Iterator[_Shot]:
    with _opened(data) as (container, stream, kind):
        tick = stream.time_base or Fraction(1, 25)
        if seek_s is not None:
            if kind not in SEEKABLE:
                return
            # A second early: what stands open before a key frame may be displayed after it.
            container.seek(int((seek_s + (zero_s or 0) - 1) / tick), stream=stream)
        packets: Iterable = read_packets(container, stream)
        stamps: Iterator[int] | None = None
        if kind in UNTIMED:  # the n-th frame displayed has the n-th time
            packets = list(packets)
            stamps = iter(sorted(packet.dts for packet in packets if packet.dts is not None))
        for packet in chain(packets, [None]):  # None drains the decoder
            try:
                frames = stream.codec_context.decode(packet)
            except InvalidDataError:
                continue  # costs the frames of a damaged packet, as in any player
            for frame in frames:
                pts = next(stamps, None) if stamps is not None else frame.pts
                if pts is not None:
                    zero_s = float(pts * tick) if zero_s is None else zero_s
                    yield _Shot(float(pts * tick) - zero_s, frame)


def _inside(shots: Iterator[_Shot], start_s: float, end_s: float) -> Iterator[_Shot]:
    """Yield the frames that begin inside the span, the times counted from the first one."""
    zero_s = None
    for shot in shots:
        if shot.time_s >= end_s:
            return
        if shot.time_s >= start_s - TOLERANCE_S:
            zero_s = shot.time_s if zero_s is None else zero_s
            yield _Shot(shot.time_s - zero_s, shot.frame)


def _at_rate(shots: Iterator[_Shot], fps: float, duration_s: float) -> Iterator[_Shot]:
    """Yield, at every 1 / fps seconds, the frame displayed then."""
    shown, number = None, 0
    for shot in shots:
        while shown and number / fps < shot.time_s - TOLERANCE_S:
            yield _Shot(number / fps, shown.frame)
            number += 1
        shown = shot
    while shown and number / fps < (duration_s if np.isfinite(duration_s) else shown.time_s + 1e-6) - 1e-6:
        yield _Shot(number / fps, shown.frame)
        number += 1


def _write(
    output: OutputContainer, shots: Iterable[_Shot], first: VideoFrame, *, encoding: Encoding, fps: float
) -> None:
    jpegs = encoding.num_frames is not None
    picture = _Picture(first, encoding.short_side, pix_fmt="yuvj420p" if jpegs else "yuv420p")
    sample = picture(first)
    rate = Fraction(fps).limit_denominator(1001)
    codec, options = ("mjpeg", _JPEG_OPTIONS) if jpegs else ("libx264", _x264_options(encoding))
    stream = output.add_stream(codec, rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = sample.width, sample.height, picture.pix_fmt
    context = stream.codec_context
    stream.time_base = context.time_base = Fraction(1, _CLOCK)
    context.color_range = ColorRange.JPEG if jpegs else sample.color_range
    context.colorspace = sample.colorspace
    context.thread_count = 1  # one encoder a worker; and the same bytes on every machine
    last = -1
    for shot in shots:
        frame = picture(shot.frame)
        frame.pts = last = max(last + 1, round(shot.time_s * _CLOCK))
        frame.time_base, frame.pict_type = Fraction(1, _CLOCK), 0
        frame.duration = round(_CLOCK / fps)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def _x264_options(encoding: Encoding) -> dict[str, str]:
    gop = encoding.gop or _MAX_GOP
    exact = {"keyint_min": str(gop), "sc_threshold": "0"} if encoding.gop else {}
    return {**_OPTIONS, "g": str(gop), **exact, **({"tune": encoding.tune} if encoding.tune else {})}


class _Picture:
    """Makes frames upright, of even size, not larger than wanted, in the format of the encoder."""

    def __init__(self, frame: VideoFrame, short_side: int | None, *, pix_fmt: str) -> None:
        self.pix_fmt = pix_fmt
        self.turns = round(frame.rotation / 90) % 4
        width, height = (frame.height, frame.width) if self.turns % 2 else (frame.width, frame.height)
        ratio = min(1.0, short_side / min(width, height)) if short_side else 1.0
        self.width, self.height = (max(2, round(side * ratio / 2) * 2) for side in (width, height))
        self.scaler = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        if self.turns:
            upright = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self.turns), dtype=np.uint8)
            frame = VideoFrame.from_ndarray(upright, format="rgb24")
        area = Interpolation.AREA
        return self.scaler.reformat(frame, self.width, self.height, self.pix_fmt, interpolation=area, threads=1)
