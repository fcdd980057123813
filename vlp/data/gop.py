"""Which packets to decode: the plan that makes a few frames of a video cheap and exactly right.

    targets (ticks) --key-frame table--> seek --> packets --PTS--> wanted frames --> runs of packets to decode

The frame displayed at a target is the one with the largest PTS not above it. It needs the packets from its key frame
up to its own in decoding order, and of these the decoder may drop the ones that are neither wanted nor referenced.
Between two runs the decoder is drained: entering the next GOP at its key frame never costs more than decoding on to it.

T targets, K key frames. Ticks are units of the stream's time base.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from vlp.data.container import read_packets

MAX_REORDER = 16  # how many frames may come before a frame in decoding order and after it in display (H.264, HEVC)
UNTIMED = frozenset({"avi"})  # stores no PTS, and what FFmpeg puts there is wrong where frames are reordered
SEEKABLE = frozenset({"mp4", "matroska"})  # a seek lands on a key frame not after the one asked for; it is checked


class NoPlanError(Exception):
    """The packets do not tell what is displayed when; only decoding everything can."""


class TruncatedError(Exception):
    """The file ends before a wanted frame."""


class Source(NamedTuple):
    """An opened video."""

    container: InputContainer
    stream: VideoStream
    kind: str  # the demuxer, as `container_format` names it


class Run(NamedTuple):
    """What is decoded in one go."""

    packets: list[Packet]  # in decoding order, from a key frame to the last wanted one
    key: int  # PTS of that key frame
    wanted: set[int]  # PTS


class Plan(NamedTuple):
    pts: np.ndarray  # int64 [T], the frame displayed at each target
    runs: list[Run]


def head(source: Source) -> tuple[list[Packet], int]:
    """Read the first packets of the file; return them and the PTS of the first displayed frame. Raises: NoPlanError."""
    packets = list(_until(demux(source), None, kind=source.kind))
    shown = [packet.pts for packet in packets if packet.pts is not None and not packet.is_discard]
    # In a file cut at random, frames before and around its first key frame do not decode, and time starts at that.
    if not shown or not packets[0].is_keyframe or min(shown) < (packets[0].pts or 0):
        raise NoPlanError
    return packets, min(shown)


def plan(source: Source, first: list[Packet], targets: np.ndarray, *, key_frames: np.ndarray | None) -> Plan:
    """Choose the frames displayed at `targets` (sorted ticks [T]) and the packets that they need.

    `first` are the packets of `head`; nothing else has been read yet. `key_frames` (PTS of key packets, ticks [K])
    saves reading the whole file where the container can seek.
    Raises: NoPlanError, also for a table that does not fit the file; TruncatedError.
    """
    if key_frames is None or source.kind not in SEEKABLE:
        chosen = _choose([*first, *demux(source)], targets)
    else:
        chosen = _choose_by_table(source, first, targets, key_frames=np.unique(key_frames))
    if targets[-1] >= _first_lost(source):
        raise TruncatedError
    return chosen


def _choose_by_table(source: Source, first: list[Packet], targets: np.ndarray, *, key_frames: np.ndarray) -> Plan:
    # Display order: a leading picture of an open GOP is displayed before its key frame, so it falls to the GOP before.
    gops = np.searchsorted(key_frames, targets, side="right") - 1  # [T], -1: before the first key frame
    parts = []
    for gop in np.unique(gops):
        inside = targets[gops == gop]
        packets = demux(source)
        if gop < 0 or key_frames[gop] == first[0].pts:
            packets = chain(first, packets)  # the lowest GOP comes first, so that the file still stands behind `first`
        else:
            source.container.seek(int(key_frames[gop]), stream=source.stream)
        taken = list(_until(packets, int(inside[-1]), kind=source.kind))
        if gop >= 0 and not (taken and taken[0].is_keyframe and (taken[0].pts or 0) <= inside[0]):
            raise NoPlanError  # the seek went too far; at an earlier key frame than asked for is good enough
        parts.append(_choose(taken, inside))
    return Plan(np.concatenate([part.pts for part in parts]), [run for part in parts for run in part.runs])


def _choose(packets: list[Packet], targets: np.ndarray) -> Plan:
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    shown = np.array([i for i, packet in enumerate(packets) if not packet.is_discard])
    if len(stamps) < len(packets) or not len(shown):
        raise NoPlanError
    pts = np.array(stamps)
    order = shown[np.argsort(pts[shown], kind="stable")]  # positions in decoding order, sorted by display
    rank = np.searchsorted(pts[order], targets, side="right") - 1
    frames = order[rank.clip(min=0)]  # [T]
    keys = np.array([i for i, packet in enumerate(packets) if packet.is_keyframe])
    entries = np.array([_entry(keys, pts, frame) for frame in frames])  # [T]
    runs = []
    for entry in np.unique(entries):
        inside = frames[entries == entry]
        runs.append(Run(packets[entry : inside.max() + 1], int(pts[entry]), set(pts[inside].tolist())))
    return Plan(pts[frames], runs)


def _entry(keys: np.ndarray, pts: np.ndarray, frame: int) -> int:
    # A key frame that is displayed after the frame is the one that the frame leads: it refers to the GOP before.
    before = keys[(keys <= frame) & (pts[keys] <= pts[frame])] if len(keys) else keys
    return int(before[-1]) if len(before) else 0


def demux(source: Source) -> Iterator[Packet]:
    """Yield the packets from where the file stands."""
    return read_packets(source.container, source.stream)


def _until(packets: Iterable[Packet], target: int | None, *, kind: str) -> Iterator[Packet]:
    """Yield packets until no later one is displayed at or before `target` (None: the first displayed frame)."""
    limit, num_later = target, 0
    for packet in packets:
        if packet.pts is None:
            raise NoPlanError
        yield packet
        if target is None and not packet.is_discard:
            limit = packet.pts if limit is None else min(limit, packet.pts)
        if limit is None:
            continue
        num_later += packet.pts > limit
        # MP4 stores DTS, which only grow and never exceed the PTS. Other demuxers guess them: there, count.
        if num_later > MAX_REORDER or (kind == "mp4" and packet.dts is not None and packet.dts > limit):
            return


def _first_lost(source: Source) -> float:
    """Return the DTS of the first packet that an mp4 lists but, cut short, does not hold; infinity if it is whole."""
    entries, size = source.stream.index_entries, source.container.size
    if source.kind != "mp4" or not len(entries) or entries[-1].pos + entries[-1].size <= size:
        return np.inf
    return min(entry.timestamp for entry in entries if entry.pos + entry.size > size)
