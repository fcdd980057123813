"""Facts of a video or a still image, read from its container; what is broken, refused or too large says why.

Untrusted bytes are opened by `vlp.data.container`: forced container, no other file, no audio or subtitle decoder.
Before that, tables that would make FFmpeg allocate without bound are refused. Every packet is demuxed and one frame is
decoded, so that OK means that a picture comes out.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vlp.data.container import (
    CODECS,
    IMAGES,
    codec_name,
    container_format,
    first_video,
    open_container,
    read_packets,
)
from vlp.types import Reason

_HEADER_TELLS = ("mp4", "matroska")  # containers that say all without a decoded frame
_MAX_PACKETS_TO_FIRST_FRAME = 300  # the longest wait for a decodable frame: a stream that is joined inside a long GOP
_MAX_TABLES = 4  # all tracks together may have this many times `max_frames` samples
_MAX_BOXES = 1_000_000  # a second of walking
_MAX_DEPTH = 12
_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex", b"udta", b"wide", b"meta"}


class VideoFacts(NamedTuple):
    """What the index knows of a video. Times are those of displayed frames; edit lists are applied."""

    width: int  # coded, before rotation
    height: int
    num_frames: int  # displayed; 1 for a still image
    fps: float  # average; 0 for a still image
    duration_s: float  # from the start of the first frame to the end of the last; 0 for a still image
    rotation: int  # 0, 90, 180, 270: degrees counter-clockwise to turn a decoded frame by, `frame.rotation` of PyAV
    codec: str  # one of CODECS of `vlp.data.container`
    start_s: float  # pts of the first displayed frame
    key_frames: np.ndarray  # [K] int64, ascending pts of key packets in the time base of the stream


class Limits(NamedTuple):
    """The largest video that is accepted; `codecs` can only narrow the CODECS of `vlp.data.container`."""

    max_pixels: int = 8192 * 4320
    max_frames: int = 1_000_000
    max_seconds: float = 6 * 3600
    max_bytes: int = 4 << 30
    codecs: tuple[str, ...] = tuple(sorted(CODECS))


LIMITS = Limits()


class ProbeError(Exception):
    """The video cannot be used: `reason` and one line of `detail`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason.name.lower()}: {self.detail}"


def probe(data: bytes, limits: Limits = LIMITS) -> VideoFacts:
    """Return the facts of an mp4, mov, matroska, webm, avi, mpegts, jpg, png or webp file held in memory.

    Raises:
        ProbeError: VIDEO_EMPTY, VIDEO_BROKEN (no container, no packet or no decodable frame), VIDEO_TRUNCATED (the file
            is shorter than its structure says), NO_VIDEO_STREAM, CODEC_REFUSED or LIMIT_EXCEEDED.
    """
    if not data:
        raise ProbeError(Reason.VIDEO_EMPTY, "no bytes")
    _check_limit(len(data), limits.max_bytes, "bytes")
    kind = container_format(data)
    if kind is None:
        page = data.lstrip()[:15].lower().startswith((b"<!doctype", b"<html"))
        begin = "a web page" if page else f"the bytes {data[:8].hex(' ')}"
        raise ProbeError(Reason.VIDEO_BROKEN, f"no video or image that is read here begins with {begin}")
    _check_declared(data, kind, limits)
    missing = _missing(data, kind)
    cut = f"; {missing} bytes are missing at the end" if missing > 0 else ""
    decode_to_probe = kind not in _HEADER_TELLS
    try:
        container = open_container(data, kind, decode_to_probe=decode_to_probe, max_pixels=_decoder_pixels(limits))
    except (FFmpegError, OverflowError) as error:
        detail = f"the {kind} container cannot be read: {_words(error)}{cut}"
        raise ProbeError(Reason.VIDEO_BROKEN, detail) from error
    with container:
        stream = _pick(container, limits)
        packets, frame = _demux(container, stream, kind=kind, limits=limits)
        if missing > 0:
            raise ProbeError(Reason.VIDEO_TRUNCATED, cut.removeprefix("; "))
        return _facts(stream, packets, frame=frame, kind=kind, limits=limits)


def _decoder_pixels(limits: Limits) -> int:
    """Return the limit for decoders, which count the padding of a frame too; what they let through is checked after."""
    return 2 * limits.max_pixels + (1 << 16)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _pick(container: InputContainer, limits: Limits) -> VideoStream:
    stream = first_video(container)
    if stream is None:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise ProbeError(Reason.NO_VIDEO_STREAM, f"streams: {kinds}")
    codec = codec_name(stream)
    if codec not in limits.codecs or codec not in CODECS:
        allowed = ", ".join(sorted(CODECS.intersection(limits.codecs)))
        raise ProbeError(Reason.CODEC_REFUSED, f"codec {codec or 'unknown'}; allowed are {allowed}")
    context = stream.codec_context
    _check_limit(context.width * context.height, limits.max_pixels, f"pixels ({context.width} x {context.height})")
    context.options = {"max_pixels": str(_decoder_pixels(limits))}
    context.thread_count = 1
    return stream


def _check_limit(value: float, limit: float, unit: str) -> None:
    if value > limit:
        raise ProbeError(Reason.LIMIT_EXCEEDED, f"{value:.10g} {unit}; at most {limit:.10g} are allowed")


def _check_declared(data: bytes, kind: str, limits: Limits) -> None:
    """Refuse what would make FFmpeg allocate without bound while it opens a file of a few kilobytes."""
    if kind == "png_pipe" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        _check_limit(width * height, limits.max_pixels, f"pixels ({width} x {height})")
    if kind == "mp4":
        samples = _declared_samples(data)
        _check_limit(samples, _MAX_TABLES * limits.max_frames, "samples in the tables of its tracks")


def _declared_samples(data: bytes) -> int:
    """Return how many index entries FFmpeg would make; a table of equal values takes 12 bytes for 4 billion of them."""
    total, track = 0, {}
    for count, (kind, start, end) in enumerate(_boxes(data, 0, len(data))):
        _check_limit(count, _MAX_BOXES, "boxes or more")
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
    """Yield (type, start, end) of each box and of the boxes inside it, `end` never after that of the parent."""
    for kind, body, stop in _siblings(data, start, end):
        stop = min(stop, end)
        yield kind, body, stop
        if kind in _PARENTS and depth < _MAX_DEPTH:
            # A `meta` box has four bytes of version before its children, except in QuickTime files.
            skip = 4 if kind == b"meta" and data[body : body + 4] == bytes(4) else 0
            yield from _boxes(data, body + skip, stop, depth + 1)


def _siblings(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of the boxes of one level; the last `end` may lie behind the data."""
    while start + 8 <= end:
        size, kind, body = _u32(data, start, end), data[start + 4 : start + 8], start + 8
        if size == 1:
            size, body = int.from_bytes(data[start + 8 : start + 16]), start + 16
        size = size or end - start
        if start + size < body:
            return
        yield kind, body, start + size
        start += size


def _u32(data: bytes, at: int, end: int) -> int:
    return int.from_bytes(data[at : at + 4]) if at + 4 <= min(end, len(data)) else 0


def _entries(data: bytes, start: int, end: int, *, columns: int) -> np.ndarray:
    """Return the rows of a table as int64 [K, columns], as many as there are bytes for."""
    count = min(_u32(data, start + 4, end), max(0, min(end, len(data)) - start - 8) // (4 * columns))
    numbers = np.frombuffer(data, ">u4", count * columns, start + 8 if count else 0)
    return numbers.reshape(count, columns).astype(np.int64)


def _demux(
    container: InputContainer, stream: VideoStream, *, kind: str, limits: Limits
) -> tuple[np.ndarray, VideoFrame]:
    """Return the packets as int64 [K, 4], columns (pts, duration, displayed, key), and the first frame that decodes."""
    rows: list[tuple[int, int, bool, bool]] = []
    frame = None
    try:
        for packet in read_packets(container, stream):
            if rows and kind in IMAGES:
                continue
            if packet.is_corrupt and kind != "mpegts":  # there it marks a lost transport packet
                raise ProbeError(Reason.VIDEO_TRUNCATED, f"packet {len(rows)} is cut short")
            _check_limit(len(rows) + 1, limits.max_frames, "frames or more")
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is None:
                raise ProbeError(Reason.VIDEO_BROKEN, f"packet {len(rows)} has no time")
            rows.append((pts, packet.duration or 0, not packet.is_discard, packet.is_keyframe))
            if frame is None and len(rows) <= _MAX_PACKETS_TO_FIRST_FRAME:
                frame = _first(stream, packet)
    except (FFmpegError, OverflowError) as error:
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
    except FFmpegError:
        return None


def _missing(data: bytes, kind: str) -> int:
    """Return how many bytes the file is shorter than its outermost structure states; at most 0 where it is whole."""
    end = 0
    if kind == "mp4":
        media = (b"mdat", b"moof", b"moov")
        end = max((stop for box, _, stop in _siblings(data, 0, len(data)) if box in media), default=0)
    elif kind == "avi":
        while data[end : end + 4] == b"RIFF":
            end += 8 + int.from_bytes(data[end + 4 : end + 8], "little")
    elif kind == "matroska":
        end = _segment_end(data)
    return end - len(data)


def _segment_end(data: bytes) -> int:
    """Return where the segment of a matroska file ends; 0 where the writer did not know."""
    header, at = _ebml_size(data, 4)
    at += header or 0
    if data[at : at + 4] != b"\x18\x53\x80\x67":
        return 0
    size, at = _ebml_size(data, at + 4)
    return at + size if size is not None else 0


def _ebml_size(data: bytes, at: int) -> tuple[int | None, int]:
    """Read a variable-length size; None is the reserved value "unknown". Returns it and where the content begins."""
    length = 9 - data[at].bit_length() if at < len(data) and data[at] else 1
    value = int.from_bytes(data[at : at + length]) & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), at + length


def _facts(stream: VideoStream, packets: np.ndarray, *, frame: VideoFrame, kind: str, limits: Limits) -> VideoFacts:
    _check_limit(frame.width * frame.height, limits.max_pixels, f"pixels ({frame.width} x {frame.height})")
    num_frames, start_s, duration_s = 1, 0.0, 0.0
    if kind not in IMAGES:
        # MPEG-TS does not say how long a frame is displayed; FFmpeg guesses.
        num_frames, start_s, duration_s = _timeline(stream, packets, first=frame.pts, timed=kind != "mpegts")
    _check_limit(duration_s, limits.max_seconds, "seconds")
    return VideoFacts(
        width=frame.width,
        height=frame.height,
        num_frames=num_frames,
        fps=num_frames / duration_s if duration_s else 0.0,
        duration_s=duration_s,
        rotation=round(frame.rotation / 90) * 90 % 360,
        codec=codec_name(stream) or "",
        start_s=start_s,
        key_frames=np.sort(packets[packets[:, 3] == 1, 0]),
    )


def _timeline(stream: VideoStream, packets: np.ndarray, *, first: int | None, timed: bool) -> tuple[int, float, float]:
    """Return the number of displayed frames, the time of the first and the seconds from it to the end of the last."""
    tick_s = float(stream.time_base or 0)
    shown = packets[packets[:, 2] == 1]
    if first is not None:  # what stands before the first frame that decodes is never displayed
        shown = shown[shown[:, 0] >= first]
    if not len(shown) or tick_s <= 0:
        raise ProbeError(Reason.VIDEO_BROKEN, "no packet is displayed, or the stream has no time base")
    start, last = int(shown[:, 0].min()), int(shown[:, 0].max())
    length = int(shown[shown[:, 0].argmax(), 1]) * tick_s
    if length <= 0 or not timed:
        gap_s = (last - start) * tick_s / max(1, len(shown) - 1)
        length = gap_s or 1 / float(stream.average_rate or 25)
    return len(shown), start * tick_s, (last - start) * tick_s + length
