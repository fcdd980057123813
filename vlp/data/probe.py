"""Facts of a video or a still image, read from its container; what is broken, refused or too large says why.

Nothing is opened but the bytes given: the container is forced by its magic bytes, so that a playlist named `.mp4` is only
a broken file, and nested opens are refused. Only decoders of `CODECS` exist to FFmpeg here, hence no audio or subtitle
decoder. Every packet is demuxed; one frame is decoded, so that OK means that a picture comes out.
"""

import io
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vlp.types import Reason

# What web video is made of. Left out: mpeg1/2, wmv, prores, gif and hundreds of others, whose decoders see less fuzzing.
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "png", "webp")

_DECODERS = ",".join((*CODECS, "libdav1d"))  # FFmpeg's names of the same, as the white-list option wants them
_MOV, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_IMAGES = ("jpeg_pipe", "png_pipe", "webp_pipe")
_MAX_PACKETS_TO_FIRST_FRAME = 300  # the longest wait for a decodable frame: a stream that is joined inside a long GOP
_TABLES = 4  # all tracks together may have this many times `max_frames` samples
_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex", b"udta", b"wide", b"meta"}


class VideoFacts(NamedTuple):
    """What the index knows of a video. Times are those of displayed frames; edit lists are applied."""

    width: int  # coded, before rotation
    height: int
    num_frames: int  # displayed; 1 for a still image
    fps: float  # average; 0 for a still image
    duration_s: float  # from the start of the first frame to the end of the last; 0 for a still image
    rotation: int  # 0, 90, 180, 270: degrees counter-clockwise to turn a decoded frame by, `frame.rotation` of PyAV
    codec: str  # one of CODECS
    start_s: float  # pts of the first displayed frame
    key_frames: np.ndarray  # [K] int64, ascending pts of key packets in the time base of the stream


class Limits(NamedTuple):
    """The largest video that is accepted; `codecs` can only narrow `CODECS`."""

    max_pixels: int = 8192 * 4320
    max_frames: int = 1_000_000
    max_seconds: float = 6 * 3600
    max_bytes: int = 4 << 30
    codecs: tuple[str, ...] = CODECS


LIMITS = Limits()


class ProbeError(Exception):
    """The video cannot be used: `reason` and one line of `detail`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason.name.lower()}: {self.detail}"


class _Timeline(NamedTuple):
    """The displayed packets of a stream, in ticks of its time base."""

    first: int
    last: int
    end: int
    count: int


def probe(data: bytes, limits: Limits = LIMITS) -> VideoFacts:
    """Return the facts of an mp4, mov, matroska, webm, avi, mpegts, jpg, png or webp file held in memory.

    Raises:
        ProbeError: VIDEO_EMPTY, VIDEO_BROKEN (no container, no packet or no decodable frame), VIDEO_TRUNCATED (the file
            is shorter than its structure says), NO_VIDEO_STREAM, CODEC_REFUSED or LIMIT_EXCEEDED.
    """
    container, stream = open_video(data, limits)
    with container:
        packets, frame = _demux(container, stream, limits)
        _check_whole(data, container.format.name, packets)
        return _facts(container.format.name, stream, packets, frame, limits)


def open_video(data: bytes, limits: Limits = LIMITS) -> tuple[InputContainer, VideoStream]:
    """Open the container and pick its video stream: the first that is no cover picture. Nothing is decoded by this call.

    The caller closes the container. The codec context runs on one thread and refuses frames above `limits.max_pixels`.

    Raises:
        ProbeError: as `probe`, except for what only shows in the packets.
    """
    if not data:
        raise ProbeError(Reason.VIDEO_EMPTY, "no bytes")
    if len(data) > limits.max_bytes:
        raise ProbeError(Reason.LIMIT_EXCEEDED, f"{len(data)} bytes; at most {limits.max_bytes} are allowed")
    name = _container(data)
    _check_declared(data, name, limits)
    try:
        container = av.open(
            io.BytesIO(data),
            "r",
            format=name,
            options={"codec_whitelist": _DECODERS, "max_pixels": str(limits.max_pixels), "fpsprobesize": "0"},
            metadata_errors="replace",
            io_open=_refuse_open,
        )
    except (av.error.FFmpegError, OverflowError) as error:
        raise ProbeError(Reason.VIDEO_BROKEN, f"the {name} container cannot be read: {_words(error)}") from error
    try:
        return container, _pick(container, limits)
    except ProbeError:
        container.close()
        raise


def _container(data: bytes) -> str:
    """Return FFmpeg's name of the container, by its first bytes alone."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return _MOV
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return _MATROSKA
    if data.startswith(b"RIFF") and data[8:12] in (b"AVI ", b"WEBP"):
        return "avi" if data[8:12] == b"AVI " else "webp_pipe"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg_pipe"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png_pipe"
    if data[:1] == b"\x47" and data[188:189] == b"\x47" and data[376:377] == b"\x47":
        return "mpegts"
    what = "a web page" if data.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")) else f"bytes {data[:8].hex(' ')}"
    raise ProbeError(Reason.VIDEO_BROKEN, f"no video or image container begins with {what}")


def _refuse_open(*args: object) -> NoReturn:
    raise PermissionError("a video may not open other files")


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _pick(container: InputContainer, limits: Limits) -> VideoStream:
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise ProbeError(Reason.NO_VIDEO_STREAM, f"streams: {kinds}")
    stream = streams[0]
    context: Any = stream.codec_context  # None where this FFmpeg has no decoder
    codec = context.codec.canonical_name if context else "unknown"
    if codec not in limits.codecs or codec not in CODECS:
        raise ProbeError(Reason.CODEC_REFUSED, f"codec {codec}; allowed are {', '.join(limits.codecs)}")
    if context.width <= 0 or context.height <= 0:
        raise ProbeError(Reason.VIDEO_BROKEN, f"no picture size, or one above {limits.max_pixels} pixels")
    _check_limit(context.width * context.height, limits.max_pixels, f"pixels ({context.width} x {context.height})")
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_count = 1
    return stream


def _check_limit(value: float, limit: float, unit: str) -> None:
    if value > limit:
        raise ProbeError(Reason.LIMIT_EXCEEDED, f"{value:.10g} {unit}; at most {limit:.10g} are allowed")


def _check_declared(data: bytes, name: str, limits: Limits) -> None:
    """Refuse what would make FFmpeg allocate without bound while it opens a file of a few kilobytes."""
    if name == "png_pipe" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        _check_limit(width * height, limits.max_pixels, f"pixels ({width} x {height})")
    if name == _MOV:
        samples = _declared_samples(data)
        _check_limit(samples, _TABLES * limits.max_frames, "samples in the tables of its tracks")


def _declared_samples(data: bytes) -> int:
    """Return how many index entries FFmpeg would make: tables of constant values need no bytes, so the file is no bound."""
    total, track = 0, {}
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"cmov":
            raise ProbeError(Reason.VIDEO_BROKEN, "a compressed movie header")
        if kind == b"trak":
            total, track = total + _track_samples(track), {}
        elif kind == b"trun":
            total += _u32(data, start + 4, end)
        elif kind == b"hdlr":
            track[kind] = data[start + 8 : start + 12]
        elif kind in (b"stsz", b"stz2"):
            track[b"stsz"] = _u32(data, start + 8, end)
        elif kind in (b"stts", b"ctts", b"stsc"):
            track[kind] = _entries(data, start, end, columns=3 if kind == b"stsc" else 2)
        elif kind in (b"stco", b"co64", b"elst"):
            track[kind] = _u32(data, start + 4, end)
    return total + _track_samples(track)


def _track_samples(track: dict[bytes, Any]) -> int:
    times = track.get(b"stts", np.zeros((0, 2), np.int64))
    if track.get(b"hdlr") == b"soun" and len(times) == 1 and times[0, 1] == 1:
        # Uncompressed sound, one table entry a sample: FFmpeg takes 1,024 of them at once, chunk by chunk.
        runs, chunks = track.get(b"stsc", np.zeros((0, 3), np.int64)), track.get(b"stco", 0) + track.get(b"co64", 0)
        return int(runs[:, 1].max(initial=0)) * chunks // 1024
    offsets = track.get(b"ctts", np.zeros((0, 2), np.int64))
    samples = max(track.get(b"stsz", 0), int(times[:, 0].sum()), int(offsets[:, 0].sum()))
    return samples * max(1, track.get(b"elst", 0))  # each edit may list all samples again


def _boxes(data: bytes, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of each box and of the boxes inside it; `end` may lie outside the data at the top level."""
    while start + 8 <= end and depth < 12:
        size, kind = _u32(data, start, end), data[start + 4 : start + 8]
        body = start + 8
        if size == 1:
            size, body = int.from_bytes(data[start + 8 : start + 16]), start + 16
        size = size or end - start
        if start + size < body:
            return
        stop = start + size
        yield kind, body, stop if depth == 0 else min(stop, end)
        if kind in _PARENTS:
            # A `meta` box has four bytes of version before its children, except in QuickTime files.
            skip = 4 if kind == b"meta" and data[body : body + 4] == bytes(4) else 0
            yield from _boxes(data, body + skip, min(stop, end), depth + 1)
        start = stop


def _u32(data: bytes, at: int, end: int) -> int:
    return int.from_bytes(data[at : at + 4]) if at + 4 <= min(end, len(data)) else 0


def _entries(data: bytes, start: int, end: int, *, columns: int) -> np.ndarray:
    """Return the rows of a table as int64 [K, columns], as many as there are bytes for."""
    count = min(_u32(data, start + 4, end), max(0, min(end, len(data)) - start - 8) // (4 * columns))
    return np.frombuffer(data, ">u4", count * columns, start + 8 if count else 0).reshape(count, columns).astype(np.int64)


def _demux(container: InputContainer, stream: VideoStream, limits: Limits) -> tuple[np.ndarray, VideoFrame]:
    """Return the packets as int64 [K, 4], columns (pts, duration, displayed, key), and the first frame that decodes."""
    rows: list[tuple[int, int, bool, bool]] = []
    frame = None
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or (rows and container.format.name in _IMAGES):
                continue
            if packet.is_corrupt and container.format.name != "mpegts":  # there it marks a lost transport packet
                raise ProbeError(Reason.VIDEO_TRUNCATED, f"packet {len(rows)} is cut short")
            _check_limit(len(rows) + 1, limits.max_frames, "frames or more")
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is None:
                raise ProbeError(Reason.VIDEO_BROKEN, f"packet {len(rows)} has no time")
            rows.append((pts, packet.duration or 0, not packet.is_discard, packet.is_keyframe))
            if frame is None and len(rows) <= _MAX_PACKETS_TO_FIRST_FRAME:
                frame = _first(stream, packet)
    except (av.error.FFmpegError, OverflowError) as error:
        reason = Reason.VIDEO_TRUNCATED if frame else Reason.VIDEO_BROKEN
        raise ProbeError(reason, f"cannot be read after packet {len(rows)}: {_words(error)}") from error
    if not rows:
        raise ProbeError(Reason.VIDEO_BROKEN, "the video stream has no packets")
    frame = frame or _first(stream, None)
    if frame is None:
        raise ProbeError(Reason.VIDEO_BROKEN, f"no frame can be decoded from {len(rows)} packets")
    return np.array(rows, np.int64), frame


def _first(stream: VideoStream, packet: Packet | None) -> VideoFrame | None:
    """Feed a packet (None: the end) and return the first frame that comes out; damaged packets give none."""
    try:
        return next(iter(stream.codec_context.decode(packet)), None)
    except av.error.FFmpegError:
        return None


def _check_whole(data: bytes, name: str) -> None:
    """Compare the length of the file with the one that its outermost structure states."""
    missing = 0
    if name == _MOV:
        missing = max((end - len(data) for kind, _, end in _top(data) if kind in (b"mdat", b"moof", b"moov")), default=0)
    elif name == "avi":
        missing = int.from_bytes(data[4:8], "little") + 8 - len(data)
    elif name == _MATROSKA:
        missing = _segment_end(data) - len(data)
    if missing > 0:
        raise ProbeError(Reason.VIDEO_TRUNCATED, f"{missing} bytes are missing at the end")
