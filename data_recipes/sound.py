"""Sound of stored videos: packets are copied or left out, never decoded, so that no sound decoder ever runs."""

import io
from collections.abc import Iterator
from contextlib import ExitStack

import av
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream

from vlp.data.container import container_format, first_video, open_container
from vlp.data.gop import SEEKABLE
from vlp.data.probe import LIMITS

_CODECS = frozenset({"aac", "mp3", "opus", "ac3", "eac3", "flac", "alac"})  # what players of mp4 know


def has_sound(data: bytes) -> bool:
    """Return whether a file has a sound track."""
    if container_format(data) is None:
        return False
    with _opened(data) as container:
        return bool(container.streams.audio)


def without_sound(data: bytes) -> bytes | None:
    """Return the video track alone as mp4, its packets as they are; None if only encoding it again can do that."""
    if container_format(data) not in SEEKABLE:
        return None
    file = io.BytesIO()
    with _opened(data) as source, av.open(file, "w", format="mp4") as output:
        stream = first_video(source)
        if stream is None:
            return None
        copy = output.add_stream_from_template(stream)
        for packet in _packets(source, stream):
            if packet.is_discard or packet.dts is None:  # hidden by an edit list, which a copy would lose
                return None
            packet.stream = copy
            output.mux(packet)
    return file.getvalue()


def with_sound(video: bytes, source: bytes, *, span: tuple[float, float]) -> tuple[bytes, tuple[str, ...]]:
    """Return an mp4 of a video track and the sound that a source has in a span, in seconds of its own clock.

    Where the sound cannot be copied the video comes back as it is, with a note.
    """
    file = io.BytesIO()
    try:
        with ExitStack() as stack:
            silent, sounding = stack.enter_context(_opened(video)), stack.enter_context(_opened(source))
            track = sounding.streams.audio[0]
            name = track.codec_context.name if track.codec_context else "unknown"
            if name not in _CODECS:
                return video, (f"sound lost: {name} is not stored in mp4",)
            output = stack.enter_context(av.open(file, "w", format="mp4"))
            picture = silent.streams.video[0]
            copies = output.add_stream_from_template(picture), output.add_stream_from_template(track)
            _copy(output, copies[0], _packets(silent, picture))
            _copy(output, copies[1], _between(_packets(sounding, track), float(track.time_base or 1), span))
    except FFmpegError as error:
        return video, (f"sound lost: {error.strerror}",)
    return file.getvalue(), ()


def _copy(output: OutputContainer, stream: Stream, packets: Iterator[Packet]) -> None:
    for packet in packets:
        packet.stream = stream
        output.mux(packet)


def _between(packets: Iterator[Packet], tick_s: float, span: tuple[float, float]) -> Iterator[Packet]:
    """Yield the packets that begin in a span, their times counted from its start."""
    first, last = (round(edge / tick_s) for edge in span)
    for packet in packets:
        if packet.pts is None or packet.dts is None or packet.pts < first:
            continue
        if packet.pts >= last:
            return
        packet.pts, packet.dts = packet.pts - first, packet.dts - first
        yield packet


def _packets(source: InputContainer, stream: Stream) -> Iterator[Packet]:
    return (packet for packet in source.demux(stream) if packet.size)


def _opened(data: bytes) -> InputContainer:
    kind = container_format(data) or ""
    return open_container(data, kind, decode_to_probe=False, max_pixels=LIMITS.max_pixels)
