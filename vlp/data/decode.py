"""A few frames of a video, exactly the right ones, for little more than the cost of their own packets.

    bytes --container_format--> demuxer --gop.plan--> runs of packets --codec--> frames --scale--> [T, H, W, 3]

Where the plan cannot promise anything (no timestamps, damaged packets, a frame that did not come out) all is decoded.

T requested times, H W pixels. Ticks are units of the stream's time base.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import numpy as np
from av.error import FFmpegError, InvalidDataError
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from vlp.data import gop
from vlp.data.container import CODECS, codec_name, container_format, first_video, has_cuts, open_container
from vlp.data.probe import LIMITS
from vlp.types import Reason

TOLERANCE_S = 1e-3  # timestamps are rounded (Matroska: to 1 ms): a frame that starts this much too late is displayed


class DecodeError(Exception):
    """A video gives no frames: `reason` says why, `detail` what the library said."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)  # all arguments, so that it survives the way out of a worker
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.reason.name.lower() + (f" ({self.detail})" if self.detail else "")


class Decoded(NamedTuple):
    frames: np.ndarray  # uint8 [T, H, W, 3]
    times_s: np.ndarray  # float64 [T], when each frame begins to be displayed, from the first displayed frame


class Pictures:
    """The frames of a video, or a still image, as `decode` gives them; a decoder by config, see `vlp.data.fields`."""

    height = width = None  # those of the video

    def __call__(
        self, data: bytes, times_s: np.ndarray, *, short_side: int | None, key_frames: np.ndarray | None = None
    ) -> Decoded:
        return decode(data, times_s, short_side=short_side, key_frames=key_frames)


def decode(
    data: bytes, times_s: np.ndarray, *, short_side: int | None, key_frames: np.ndarray | None = None
) -> Decoded:
    """Return the frames displayed at `times_s` (float [T], seconds from the first displayed frame, in any order).

    The frame displayed at t is the last one with PTS <= t, give or take 1 ms or half a tick, whichever is less; the
    first frame for t < 0, the last for t beyond the end. So it began at most one frame interval before t, and half an
    interval where t is the middle of a frame. A still image is displayed at all times.

    Frames are scaled so that the shorter side has `short_side` pixels (None: the coded size; pixels count as square)
    and turned as the display matrix says. `key_frames` (int64 [K], PTS of the key packets in the stream's time base) is
    the table of the shard index: with it only the needed GOPs are read. Only the first video stream is read, with one
    thread. Unless the file is damaged, the result is bit-identical to that of a full decode.

    Raises: DecodeError, with VIDEO_TRUNCATED if an mp4 was cut short and a wanted frame may be among those it lost.
    ValueError if `times_s` or `short_side` make no sense.
    """
    times_s = np.asarray(times_s, dtype=np.float64)
    if times_s.ndim != 1 or not len(times_s) or not np.isfinite(times_s).all():
        raise ValueError(f"times_s={times_s} must be a list of finite seconds, at least one; check the sampling.")
    if short_side is not None and short_side < 1:
        raise ValueError(f"short_side={short_side} must be at least 1, or None to keep the coded size.")
    kind = kind_of(data)
    try:
        return _decode(data, times_s, kind=kind, short_side=short_side, key_frames=key_frames)
    except (FFmpegError, OverflowError) as error:  # absurd time bases overflow
        raise DecodeError(Reason.VIDEO_BROKEN, str(error)) from error
    except gop.TruncatedError as error:
        raise DecodeError(Reason.VIDEO_TRUNCATED, f"no frame for {times_s.max():.3f} s") from error


def kind_of(data: bytes) -> str:
    """Return the demuxer of bytes that may be opened. Raises: DecodeError, for none, too many, or an unknown kind."""
    if not data:
        raise DecodeError(Reason.VIDEO_EMPTY)
    if len(data) > LIMITS.max_bytes:
        raise DecodeError(Reason.LIMIT_EXCEEDED, f"{len(data)} bytes; at most {LIMITS.max_bytes} are allowed")
    kind = container_format(data)
    if kind is None:
        raise DecodeError(Reason.VIDEO_BROKEN, f"unknown container, the first bytes are {data[:12].hex(' ')}")
    return kind


def _decode(
    data: bytes, times_s: np.ndarray, *, kind: str, short_side: int | None, key_frames: np.ndarray | None
) -> Decoded:
    # Where parts are shown in another order, a key frame may have several times: the table cannot tell where to go.
    tables = [None] if key_frames is None or (kind == "mp4" and has_cuts(data)) else [key_frames, None]
    for table in tables:
        try:
            return _decode_by_plan(data, times_s, kind=kind, short_side=short_side, key_frames=table)
        except (gop.NoPlanError, FFmpegError):
            continue  # the table is wrong: without it; no plan can be made: everything
    return _decode_all(data, times_s, kind=kind, short_side=short_side)


def _decode_by_plan(
    data: bytes, times_s: np.ndarray, *, kind: str, short_side: int | None, key_frames: np.ndarray | None
) -> Decoded:
    if kind in gop.UNTIMED:
        raise gop.NoPlanError
    with _opened(data, kind, decode_to_probe=False) as source:
        first, start = gop.head(source)
        targets, inverse = np.unique(_ticks(times_s, source, start=start), return_inverse=True)
        plan = gop.plan(source, first, targets, key_frames=key_frames)
        pts, canvas, found = plan.pts[inverse], _Canvas(len(times_s), source, short_side), set()  # [T]
        for frame in chain.from_iterable(_decode_run(source, run) for run in plan.runs):
            canvas.put(frame, pts == frame.pts)
            found.add(frame.pts)
        if len(found) < sum(len(run.wanted) for run in plan.runs):
            raise gop.NoPlanError
        return Decoded(canvas.frames, (pts - start) * _tick_s(source))


def _decode_run(source: gop.Source, run: gop.Run) -> Iterator[VideoFrame]:
    """Yield the wanted frames of a run."""
    context = source.stream.codec_context
    droppable = "NONREF" if _drops_unreferenced(source) else "DEFAULT"
    entered = run.packets[0].is_discard  # hidden by an edit list: it never comes out
    context.flush_buffers()
    for packet in [*run.packets, None]:  # None drains: no later frame is decoded just to push the last one out
        if packet is not None:
            context.skip_frame = "DEFAULT" if packet.pts in run.wanted else droppable
        for frame in context.decode(packet):
            # With a rolling intra refresh, packets marked as key are not: what follows them comes out damaged.
            entered = entered or (frame.pts == run.key and frame.pict_type == PictureType.I)
            # What conceals damage may depend on frames outside the run.
            if not entered or frame.is_corrupt:
                raise gop.NoPlanError
            if frame.pts in run.wanted:
                yield frame


def _drops_unreferenced(source: gop.Source) -> bool:
    """Tell whether the decoder may drop frames that say they are not referenced.

    AV1 loses wanted frames then and VP9 gains nothing. In HEVC they may be referenced by higher temporal layers: the
    hvcC record must say that there is only one.
    """
    name, record = codec_name(source.stream), source.stream.codec_context.extradata
    if name == "hevc":
        return record is not None and len(record) > 21 and record[0] == 1 and (record[21] >> 3) & 7 == 1
    return name == "h264"


def _decode_all(data: bytes, times_s: np.ndarray, *, kind: str, short_side: int | None) -> Decoded:
    with _opened(data, kind, decode_to_probe=True) as source:
        packets = list(gop.demux(source))
        stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets if not packet.is_discard]
        known = sorted(stamp for stamp in stamps if stamp is not None)
        if len(known) < len(stamps):
            raise DecodeError(Reason.VIDEO_BROKEN, f"{len(stamps) - len(known)} of {len(stamps)} packets have no time")
        frames = _all_frames(source, packets)
        if kind in gop.UNTIMED or any(packet.pts is None for packet in packets):
            timed = zip(known, frames, strict=False)  # the n-th frame displayed has the n-th time
        else:
            timed = ((frame.pts, frame) for frame in frames if frame.pts is not None)
        first = next(timed, None)
        if first is None:
            raise DecodeError(Reason.VIDEO_BROKEN, f"no frame can be decoded from {len(packets)} packets")
        targets, inverse = np.unique(_ticks(times_s, source, start=first[0]), return_inverse=True)
        pts, canvas = np.zeros(len(times_s), np.int64), _Canvas(len(times_s), source, short_side)
        for ticks, frame, begin, end in _select(chain([first], timed), targets):
            rows = (begin <= inverse) & (inverse < end)  # [T]
            pts[rows] = ticks
            canvas.put(frame, rows)
        return Decoded(canvas.frames, (pts - first[0]) * _tick_s(source))


def _all_frames(source: gop.Source, packets: list[Packet]) -> Iterator[VideoFrame]:
    for packet in [*packets, None]:
        try:
            yield from source.stream.codec_context.decode(packet)
        except InvalidDataError:
            continue  # costs the frames of a damaged packet, as in any player


def _select(timed: Iterator[tuple[int, VideoFrame]], targets: np.ndarray) -> Iterator[tuple[int, VideoFrame, int, int]]:
    """Yield (pts, frame, begin, end) of the frames, out of all in display order, displayed at targets[begin:end]."""
    done = 0
    for pts, frame, stop in _spans(timed):
        begin, done = done, int(np.searchsorted(targets, stop))
        if begin < done:
            yield pts, frame, begin, done
        if done == len(targets):
            return


def _spans(timed: Iterator[tuple[int, VideoFrame]]) -> Iterator[tuple[int, VideoFrame, float]]:
    """Yield (pts, frame, end of display); a frame whose time runs back is never displayed."""
    shown = None
    for pts, frame in timed:
        if shown is not None and pts < shown[0]:
            continue
        if shown is not None:
            yield *shown, pts
        shown = pts, frame
    if shown is not None:
        yield *shown, np.inf


def _ticks(times_s: np.ndarray, source: gop.Source, *, start: int) -> np.ndarray:
    tick_s = _tick_s(source)
    ticks = np.floor(times_s / tick_s + min(0.5, TOLERANCE_S / tick_s))
    return start + ticks.clip(-(2.0**52), 2.0**52).astype(np.int64)


def _tick_s(source: gop.Source) -> float:
    assert source.stream.time_base is not None  # FFmpeg sets it when it makes a stream
    return float(source.stream.time_base)


@contextmanager
def _opened(data: bytes, kind: str, *, decode_to_probe: bool) -> Iterator[gop.Source]:
    with open_container(data, kind, decode_to_probe=decode_to_probe, max_pixels=LIMITS.max_pixels) as container:
        stream = first_video(container)
        if stream is None:
            raise DecodeError(Reason.NO_VIDEO_STREAM)
        if codec_name(stream) not in CODECS:
            raise DecodeError(Reason.CODEC_REFUSED, f"{codec_name(stream)} is none of {', '.join(sorted(CODECS))}")
        context = stream.codec_context
        _check_size(context.width, context.height)
        context.thread_count, context.thread_type = 1, "NONE"  # threads lose: one decoder a worker keeps a core busy
        # The header may lie about the size: the decoder holds to the limit too. "strict" makes H.264 wait for reordered
        # frames where the stream does not tell how many, instead of losing the first ones.
        context.options = {"max_pixels": str(LIMITS.max_pixels), "strict": "1"}
        yield gop.Source(container, stream, kind)


class _Canvas:
    """Frames of one stream as RGB of one size, each written once, where it stays."""

    def __init__(self, num_rows: int, source: gop.Source, short_side: int | None) -> None:
        self.frames = np.zeros((num_rows, 0, 0, 3), np.uint8)  # until the first frame tells the size
        self._short_side = short_side
        self._coded = source.stream.codec_context.width, source.stream.codec_context.height  # 0: only frames tell
        self._scaler, self._packer = VideoReformatter(), VideoReformatter()

    def put(self, frame: VideoFrame, rows: np.ndarray) -> None:
        """Write a frame into some rows, bool [T]."""
        image = _upright(self._scaled(frame), frame)
        if not self.frames.size:
            self.frames = np.empty((len(rows), *image.shape), np.uint8)
        if image.shape != self.frames.shape[1:]:
            raise DecodeError(Reason.VIDEO_BROKEN, f"a frame of {image.shape}, others of {self.frames.shape[1:]}")
        for row in np.flatnonzero(rows):
            self.frames[row] = image

    def _scaled(self, frame: VideoFrame) -> np.ndarray:
        width, height = self._size(*(self._coded if all(self._coded) else (frame.width, frame.height)))
        if (width, height) != (frame.width, frame.height):
            # Into planes and these into pixels takes half the time of one step, whose last part has no vector code,
            # and keeps the colour at full width (270p to 398 x 224: 0.18 ms and 0.31 ms). AREA averages what a pixel
            # covers: of the filters that do not alias it is the cheapest.
            frame = self._scaler.reformat(frame, width, height, "gbrp", interpolation=Interpolation.AREA, threads=1)
        return self._packer.reformat(frame, format="rgb24", threads=1).to_ndarray()

    def _size(self, width: int, height: int) -> tuple[int, int]:
        ratio = self._short_side / min(width, height) if self._short_side else 1
        size = round(width * ratio), round(height * ratio)
        _check_size(*size)  # a long thin picture grows when its short side does
        return size


def _check_size(width: int, height: int) -> None:
    if width * height > LIMITS.max_pixels:
        detail = f"{width} x {height} pixels; at most {LIMITS.max_pixels} are allowed"
        raise DecodeError(Reason.LIMIT_EXCEEDED, detail)


def _upright(image: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Apply the turns and mirrors of the display matrix to an image [H, W, 3]."""
    # `frame.side_data` would tie frame and container into a cycle: whole frames would wait for the garbage collector.
    side_data = SideDataContainer(frame).get("DISPLAYMATRIX")  # pyright: ignore[reportCallIssue]  (its stub lacks it)
    if side_data is None:
        return image
    # x' = a x + c y, y' = b x + d y, in fixed point. Angles between the right ones are not meant for decoders.
    a, b, _, c, d = np.frombuffer(side_data, dtype=np.int32)[:5]
    if abs(int(b)) > abs(int(a)):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
