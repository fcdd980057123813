"""Frames of videos packed into lines of text, read where they lie: the TSV files of VIOLET and what follows it.

    img_NAME.tsv      a video a line: its id, perhaps an object in JSON, and its frames as JPEG in base64, between tabs
    img_NAME.lineidx  where each line begins, in bytes, one number a line; without it the TSV is read once to know

A video comes out as an mp4 of those JPEGs, bit for bit, a frame a second: when the frames were displayed, nobody wrote
down. Ids and lengths are only ever compared and counted; nothing is unpickled (img_NAME.id2lineidx.pkl is not needed).
"""

import base64
import binascii
import io
import os
from collections.abc import Iterator
from fractions import Fraction

import av

from vlp.data.probe import ProbeError, probe
from vlp.types import Reason

_MAX_ID = 1000  # bytes
_JPEG = b"/9j/"  # how each JPEG begins in base64


def lines(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield (id, offset, size) of the lines of a TSV.

    Raises:
        ValueError: the .lineidx beside it is not its own.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        offsets = _offsets(path, size)
        if offsets is None:
            at = 0
            for line in file:
                yield _id(line, path, at), at, len(line)
                at += len(line)
            return
        for begin, end in zip(offsets, [*offsets[1:], size], strict=True):
            if begin and os.pread(file.fileno(), 1, begin - 1) != b"\n":
                raise ValueError(f"{path!r} has no line at byte {begin}, as its .lineidx says; remove the .lineidx.")
            yield _id(os.pread(file.fileno(), min(end - begin, _MAX_ID), begin), path, begin), begin, end - begin


def unpacked(line: bytes) -> bytes:
    """Return the mp4 of a line.

    Raises:
        ProbeError: it holds no frames, or something else.
    """
    fields = line.rstrip(b"\r\n").split(b"\t")[1:]
    if fields and fields[0][:4] != _JPEG:  # {"class": ..., "width": ..., "height": ...}
        fields = fields[1:]
    if not fields:
        raise ProbeError(Reason.VIDEO_EMPTY, "a line without frames")
    try:
        frames = [base64.b64decode(field, validate=True) for field in fields]
    except (binascii.Error, ValueError) as error:
        raise ProbeError(Reason.VIDEO_BROKEN, f"a frame is not base64: {error}") from error
    facts = [probe(frame) for frame in frames]
    kinds = {(each.codec, each.width, each.height) for each in facts}
    if len(kinds) > 1 or facts[0].codec != "mjpeg":
        raise ProbeError(Reason.VIDEO_BROKEN, f"frames of different kinds: {sorted(kinds)[:3]}")
    return _muxed(frames, facts[0].width, facts[0].height)


def _offsets(path: str, size: int) -> list[int] | None:
    beside = os.path.splitext(path)[0] + ".lineidx"
    if not os.path.exists(beside):
        return None
    with open(beside, encoding="ascii", errors="replace") as file:
        try:
            offsets = [int(line) for line in file]
        except ValueError as error:
            raise ValueError(f"{beside!r} holds something else than numbers: {error}; remove it.") from error
    if offsets[:1] != [0] or any(one >= two for one, two in zip(offsets, [*offsets[1:], size], strict=True)):
        raise ValueError(f"{beside!r} is not of {path!r}: its numbers do not rise from 0 to {size}; remove it.")
    return offsets


def _id(line: bytes, path: str, at: int) -> str:
    name, tab, _ = line[:_MAX_ID].partition(b"\t")
    if not tab:
        raise ValueError(f"{path!r} has no id and tab at byte {at}; is it a TSV of frames, and its .lineidx its own?")
    return name.decode(errors="replace")


def _muxed(frames: list[bytes], width: int, height: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        stream.time_base = Fraction(1)
        for number, frame in enumerate(frames):
            packet = av.Packet(frame)
            packet.stream, packet.time_base = stream, Fraction(1)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, True
            output.mux(packet)
    return file.getvalue()
