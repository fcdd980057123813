"""Tiny real video files for the tests, encoded in memory; every frame carries its number, so that it can be recognised.

A frame is a grid of 4 x 3 cells: cell k is bright where bit k of the frame number is set. A moving texture on top of it
gives the encoder something to predict, so that reference and non-reference frames really differ.
"""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

COLUMNS, ROWS = 4, 3
CLOCK = 600  # pts ticks a second of the files made here; 20 ticks are one frame at 30 fps


def picture(number: int, *, width: int, height: int) -> np.ndarray:
    """Return frame `number` as uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    bit = (y * ROWS // height) * COLUMNS + x * COLUMNS // width
    bright = (number >> bit) & 1
    texture = 24 * np.sin((x + 3 * number) / 5) + 16 * np.sin((y - 2 * number) / 4)
    grey = np.where(bright, 200, 55) + texture
    return np.stack([grey, grey * 0.8 + 20, 255 - grey], axis=-1).clip(0, 255).astype(np.uint8)


def number(frame: np.ndarray) -> int:
    """Read the number that `picture` wrote into a frame of any size."""
    green = frame[..., 1].astype(np.float64)
    rows = [np.array_split(row, COLUMNS, axis=1) for row in np.array_split(green, ROWS, axis=0)]
    cells = [cell.mean() > 122 for row in rows for cell in row]
    return sum(int(bright) << bit for bit, bright in enumerate(cells))


def numbers(frames: np.ndarray) -> list[int]:
    return [number(frame) for frame in frames]


def clip(
    num_frames: int = 24,
    *,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    pts: Sequence[int] | None = None,
    layout: str = "v",
) -> bytes:
    """Encode a clip of `size` (width, height); `pts` in ticks of 1/CLOCK s (default 30 fps).

    `layout` names the streams in order: "v" the clip, "a" a second of silence, "w" a second video of other frames.
    """
    file = io.BytesIO()
    pts = pts if pts is not None else [i * CLOCK // 30 for i in range(num_frames)]
    with av.open(file, "w", format=container) as output:
        how = {"codec": codec, "size": size, "pix_fmt": pix_fmt, "options": options}
        streams = [_add_stream(output, kind, **how) for kind in layout]
        for kind, stream in zip(layout, streams, strict=True):
            first = 1000 if kind == "w" else 0
            frames = _silence() if kind == "a" else _frames(pts, first=first, size=size, pix_fmt=pix_fmt)
            for frame in [*frames, None]:
                output.mux(stream.encode(frame))
    return file.getvalue()


def _add_stream(output, kind, *, codec, size, pix_fmt, options):
    if kind == "a":
        return output.add_stream("aac", rate=16000)
    stream = output.add_stream(codec, rate=30, options=options or {})
    stream.width, stream.height = size
    stream.pix_fmt = pix_fmt
    # MPEG-4 knows no finer clock than the frame rate, and AVI would fill a finer one with empty frames.
    coarse = codec == "mpeg4" or output.format.name == "avi"
    stream.time_base = stream.codec_context.time_base = Fraction(1, 30 if coarse else CLOCK)
    stream.codec_context.thread_count = 1
    return stream


def _frames(pts, *, first, size, pix_fmt):
    for i, ticks in enumerate(pts):
        frame = av.VideoFrame.from_ndarray(picture(first + i, width=size[0], height=size[1]), format="rgb24")
        frame = frame.reformat(format=pix_fmt, threads=1)
        frame.pts, frame.time_base = ticks, Fraction(1, CLOCK)
        yield frame


def _silence():
    for i in range(16):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, i * 1024
        yield frame


def remux(
    data: bytes,
    *,
    first: int = 0,
    shift: int = 0,
    container: str = "mp4",
    options: dict[str, str] | None = None,
    title: str = "",
) -> bytes:
    """Copy the packets from number `first` (in decoding order) on, as they are, `shift` ticks of 1/CLOCK s later."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, options=options or {}) as output:
        stream = source.streams.video[0]
        output.metadata["title"] = title
        copy = output.add_stream_from_template(stream)
        ticks = int(Fraction(shift, CLOCK) / stream.time_base)
        for packet in [packet for packet in source.demux(stream) if packet.size][first:]:
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            packet.stream = copy
            output.mux(packet)
    return file.getvalue()


def rotated(data: bytes, degrees: int) -> bytes:
    """Write into an mp4 that players should turn its picture clockwise by `degrees` (0, 90, 180, 270)."""
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    return with_matrix(data, (a, b, -b, a))


def with_matrix(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Replace a, b, c, d of the display matrix in the first track header of an mp4."""
    a, b, c, d = (value << 16 for value in matrix)
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes stand before the matrix
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def with_edits(data: bytes, *edits: tuple[int, int]) -> bytes:
    """Replace the edit list of an mp4 whose header is last: (duration in 1/1000 s, start in ticks of the track)."""
    rows = b"".join(struct.pack(">IiI", duration, start, 1 << 16) for duration, start in edits)
    at = data.index(b"elst") - 4
    size = int.from_bytes(data[at : at + 4])
    table = struct.pack(">I4sII", 16 + len(rows), b"elst", 0, len(edits)) + rows
    patched = bytearray(data[:at] + table + data[at + size :])
    for box in (b"edts", b"trak", b"moov"):
        start = patched.index(box) - 4
        grown = int.from_bytes(patched[start : start + 4]) + len(table) - size
        patched[start : start + 4] = grown.to_bytes(4)
    return bytes(patched)


def damaged(data: bytes, number: int) -> bytes:
    """Overwrite the second half of packet `number` (in decoding order)."""
    with av.open(io.BytesIO(data)) as source:
        packet = [packet for packet in source.demux(video=0) if packet.size][number]
        start, end = packet.pos + packet.size // 2, packet.pos + packet.size
    return data[:start] + b"\x55" * (end - start) + data[end:]


def without_times(data: bytes) -> bytes:
    """Take the timestamps out of an MPEG-TS file, except those of its random access points."""
    patched = bytearray(data)
    for at in range(0, len(data), 188):
        extra = data[at + 4] + 1 if data[at + 3] & 0x20 else 0  # bytes of the adaptation field
        head = at + 4 + extra
        if data[head : head + 3] == b"\0\0\1" and not (extra > 1 and data[at + 5] & 0x40):
            patched[head + 7] &= 0x3F
            patched[head + 9 : head + 9 + data[head + 8]] = b"\xff" * data[head + 8]
    return bytes(patched)


def header_first(data: bytes) -> bytes:
    """Move the moov box of an mp4 before its mdat, so that the end can be cut off."""
    at = data.rindex(b"moov") - 4
    before, header = data[:at], bytearray(data[at : at + int.from_bytes(data[at : at + 4])])
    begin = data.index(b"mdat") - 4
    start = 0
    while (start := header.find(b"stco", start) + 4) > 3:
        count = int.from_bytes(header[start + 4 : start + 8])
        offsets = np.frombuffer(header, ">u4", count, start + 8) + len(header)
        header[start + 8 : start + 8 + 4 * count] = offsets.astype(">u4").tobytes()
    return before[:begin] + bytes(header) + before[begin:] + data[at + len(header) :]


def without_hints(data: bytes) -> bytes:
    """Take the usability information, hence the depth of reordering, out of the H.264 header of an mp4."""
    at = data.index(b"avcC") + 4 + 8
    size = int.from_bytes(data[at - 2 : at])
    bits = "".join(f"{byte:08b}" for byte in data[at + 4 : at + size])  # after the NAL type, profile and level
    place = 0

    def golomb() -> int:
        nonlocal place
        zeros = bits.index("1", place) - place
        place += 2 * zeros + 1
        return int(bits[place - zeros - 1 : place], 2) - 1

    golomb()
    if data[at + 1] == 100:  # High profile: colour format, depths, one flag, scaling matrices
        golomb(), golomb(), golomb()
        place += 2
    golomb()
    assert golomb() == 0  # the only kind of picture order count that x264 writes
    golomb(), golomb()
    place += 1
    golomb(), golomb()
    place += 2
    cropped, place = bits[place] == "1", place + 1
    for _ in range(4 * cropped):
        golomb()
    assert bits[place] == "1"
    short = (bits[:place] + "01").ljust(len(bits), "0")  # no usability information, end, padding
    patched = bytes(int(short[i : i + 8], 2) for i in range(0, len(short), 8))
    return data[: at + 4] + patched + data[at + size :]


def declared(data: bytes, width: int, height: int) -> bytes:
    """Write another coded size into the sample description of an H.264 mp4; the stream itself keeps its own."""
    at = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
    return data[:at] + struct.pack(">HH", width, height) + data[at + 4 :]


def flat(picture: np.ndarray, *, matrix: int) -> bytes:
    """Encode one picture without loss of note, with YUV by this colour matrix (1 = BT.709, 6 = BT.601) and named so."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = _add_stream(
            output, "v", codec="libx264", size=picture.shape[1::-1], pix_fmt="yuv444p", options={"crf": "1"}
        )
        stream.codec_context.colorspace = matrix
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv444p", dst_colorspace={1: "ITU709", 6: "ITU601"}[matrix], threads=1)
        frame.pts, frame.time_base = 0, Fraction(1, CLOCK)
        for item in (frame, None):
            output.mux(stream.encode(item))
    return file.getvalue()


def with_cover() -> bytes:
    """Encode a second of silence with a cover picture, which looks like a video stream."""
    file, picture = io.BytesIO(), image("mjpeg")
    with av.open(file, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=16000)
        cover = output.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 32, 24, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(picture)
        packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 25)
        packet.is_keyframe = True
        for frame in [*_silence(), None]:
            output.mux(sound.encode(frame))
        output.mux(packet)
    return file.getvalue()


def image(codec: str = "png", *, size: tuple[int, int] = (32, 24)) -> bytes:
    """Encode `picture(5)` as a still image: "png", "mjpeg" or "libwebp"."""
    pix_fmt = {"png": "rgb24", "mjpeg": "yuvj420p", "libwebp": "yuv420p"}[codec]
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height = size
    encoder.pix_fmt, encoder.time_base = pix_fmt, Fraction(1, 25)
    (frame,) = _frames([0], first=5, size=size, pix_fmt=pix_fmt)
    frame.pts = None
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
