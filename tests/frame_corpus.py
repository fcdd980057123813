"""Right frames: generated files of every kind, random times, and each frame compared bit for bit with a full decode.

    python tests/frame_corpus.py 8 7        # draws of times a file; a seed may follow

The decoder gets the key-frame table that an index would hold, and again none. It runs in forked and spawned processes.
"""

import io
import multiprocessing
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import av
import clips
import numpy as np
from test_decode import GOP12, IN_FULL, OPEN, PLANNED, VFR, b_frames, displayed, full_decode, hevc

from vlp.data.decode import decode
from vlp.data.probe import VideoFacts, probe

SHORT_SIDE = 40
ALL_REFERENCES = {"g": "24", "bf": "5", "refs": "8", "x264-params": "b-pyramid=normal:b-adapt=0:mixed-refs=1:weightp=2"}
LOSSY = {"g": "12", "b": "0", "crf": "40", "cpu-used": "8"}  # of VP9
ALT_REF = {"g": "40", "lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "8", "b": "100k"}
AV1 = {"g": "12", "preset": "10"}


def without_box(data: bytes, name: bytes) -> bytes:
    """Hide a box of an mp4: without `stss` every packet counts as a key frame."""
    assert data.count(name) == 1
    return data.replace(name, b"free")


def with_first_key_only(data: bytes) -> bytes:
    """Take all key-frame flags out of an mp4 but the first."""
    at = data.index(b"stss") + 8
    (count,) = struct.unpack_from(">I", data, at)
    assert count > 2
    return data[:at] + struct.pack(">I", 1) + data[at + 4 :]


h264, vp9 = partial(clips.clip, 48), partial(clips.clip, 48, codec="libvpx-vp9", container="webm")
av1 = partial(clips.clip, 48, codec="libsvtav1", options=AV1)
MORE: dict[str, Callable[[], bytes]] = {
    "h264_many_references": lambda: h264(options=ALL_REFERENCES),
    "h264_strict_pyramid": lambda: h264(options=GOP12 | {"x264-params": "b-pyramid=strict"}),
    "h264_flat_b_frames": lambda: h264(options=GOP12 | {"x264-params": "b-pyramid=none"}),
    "h264_baseline": lambda: h264(options={"g": "12", "profile": "baseline"}),
    "h264_slices": lambda: h264(options=GOP12 | {"x264-params": "slices=4"}),
    "h264_scene_cuts": lambda: h264(options={"g": "250", "bf": "3", "x264-params": "scenecut=100:min-keyint=2"}),
    "h264_422": lambda: h264(pix_fmt="yuv422p", options=GOP12),
    "h264_ten_bit_b_frames": lambda: h264(pix_fmt="yuv420p10le", options=GOP12),
    "h264_two_frames": lambda: clips.clip(2, options=GOP12),
    "h264_very_long_gop": lambda: clips.clip(600, size=(48, 32), options={"g": "9999", "bf": "3", "sc_threshold": "0"}),
    "h264_open_gop_mkv": lambda: h264(options=OPEN, container="matroska"),
    "h264_open_gop_ts": lambda: h264(options=OPEN, container="mpegts"),
    "h264_missing_key_flags": lambda: with_first_key_only(b_frames()),
    "h264_no_key_flags_at_all": lambda: without_box(b_frames(), b"stss"),
    "h264_negative_offsets": lambda: clips.remux(b_frames(), options={"movflags": "negative_cts_offsets"}),
    "h264_header_first": lambda: clips.header_first(b_frames()),
    "h264_two_videos_mov": lambda: h264(options=GOP12, layout="vaw", container="mov"),
    "h264_cut_copy_mov": lambda: clips.remux(b_frames(), first=12, shift=-12 * 20 - 100, container="mov"),
    "h264_cut_copy_fragmented": lambda: clips.remux(
        b_frames(), first=12, options={"movflags": "frag_keyframe+empty_moov"}
    ),
    "h264_start_offset_mkv": lambda: clips.remux(b_frames(), shift=900, container="matroska"),
    "h264_start_offset_ts": lambda: clips.remux(b_frames(), shift=900, container="mpegts"),
    "h264_variable_rate_mkv": lambda: clips.clip(pts=VFR, options={"g": "5", "bf": "2"}, container="matroska"),
    "h264_rotated_180": lambda: clips.rotated(b_frames(), 180),
    "h264_rotated_270": lambda: clips.rotated(h264(options=OPEN), 270),
    "h264_tall": lambda: h264(size=(64, 160), options=GOP12),
    "hevc_no_b_frames": lambda: hevc(":bframes=0"),
    "hevc_ten_bit": lambda: hevc(pix_fmt="yuv420p10le"),
    "hevc_many_references": lambda: hevc(":ref=5:b-pyramid=1:bframes=6"),
    "hevc_long_gop": lambda: hevc(":keyint=250:min-keyint=250"),
    "hevc_intra": lambda: hevc(":keyint=1:min-keyint=1"),
    "hevc_mkv": lambda: hevc(container="matroska"),
    "hevc_variable_rate": lambda: clips.clip(
        codec="libx265", pts=VFR, options={"x265-params": "keyint=5:bframes=2:log-level=none"}
    ),
    "hevc_missing_key_flags": lambda: with_first_key_only(hevc()),
    "hevc_rotated": lambda: clips.rotated(hevc(), 90),
    "vp8_webm": lambda: clips.clip(48, codec="libvpx", container="webm", options={"g": "12", "b": "200k"}),
    "vp9_hidden_frames": lambda: vp9(options=ALT_REF),
    "vp9_mp4": lambda: clips.clip(48, codec="libvpx-vp9", options=LOSSY),
    "vp9_odd_size": lambda: vp9(size=(95, 63), options=LOSSY),
    "vp9_lossless": lambda: vp9(options={"g": "12", "lossless": "1", "cpu-used": "8"}),
    "vp9_variable_rate": lambda: clips.clip(codec="libvpx-vp9", container="webm", pts=VFR, options={"g": "5"}),
    "vp9_long_gop": lambda: vp9(options=LOSSY | {"g": "250"}),
    "av1_mkv": lambda: av1(container="matroska"),
    "av1_ten_bit": lambda: av1(pix_fmt="yuv420p10le"),
    "av1_long_gop": lambda: av1(options=AV1 | {"g": "250"}),
    "av1_one_frame": lambda: clips.clip(1, codec="libsvtav1", options=AV1),
    "mpeg4_no_b_frames": lambda: clips.clip(48, codec="mpeg4", options={"g": "12"}),
    "mpeg4_quarter_pixel": lambda: clips.clip(48, codec="mpeg4", options={"g": "12", "bf": "2", "flags": "+qpel"}),
    "mpeg4_mkv": lambda: clips.clip(48, codec="mpeg4", container="matroska", options={"g": "12", "bf": "2"}),
    "mpeg4_long_gop_avi": lambda: clips.clip(48, codec="mpeg4", container="avi", options={"g": "250"}),
    "mjpeg_avi": lambda: clips.clip(codec="mjpeg", container="avi", pix_fmt="yuvj420p"),
}
FILES = PLANNED | IN_FULL | MORE
BY_NUMBER = {"avi_b_frames"}  # the times inside are wrong: the n-th frame displayed begins at n / 30 s


class Row(NamedTuple):
    name: str
    facts: VideoFacts
    num_bytes: int
    compared: int
    exact: int  # the frame is the right one, bit for bit, and its time is right


def tolerance_s(data: bytes) -> float:
    """Return how much too late a frame may begin and still be displayed, as `decode` documents it."""
    with av.open(io.BytesIO(data)) as container:
        return min(1e-3, float(container.streams.video[0].time_base) / 2)


def check(name: str, *, draws: int, seed: int) -> Row:
    """Decode a file at random times, with the table of its index and without one."""
    data = FILES[name]()
    facts = probe(data)
    starts_s, images = full_decode(data, SHORT_SIDE, timed=name not in BY_NUMBER)
    if name in BY_NUMBER:
        starts_s = np.arange(len(images)) / 30
    late_s, compared, exact = tolerance_s(data), 0, 0
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        times_s = rng.uniform(-0.1, starts_s[-1] + 0.1, rng.integers(1, 17))
        wanted = displayed(starts_s, times_s, late_s=late_s)
        for table in (facts.key_frames, None):
            decoded = decode(data, times_s, short_side=SHORT_SIDE, key_frames=table)
            same = [np.array_equal(a, b) for a, b in zip(decoded.frames, images[wanted], strict=True)]
            compared += len(same)
            exact += int((np.array(same) & (np.abs(decoded.times_s - starts_s[wanted]) < 1e-6)).sum())
    return Row(name, facts, len(data), compared, exact)


def run(names: list[str], *, draws: int, seed: int, start_method: str) -> list[Row]:
    """Check files in two processes, forked or spawned."""
    with multiprocessing.get_context(start_method).Pool(2) as pool:
        return pool.map(partial(check, draws=draws, seed=seed), names, chunksize=1)


def table(rows: list[Row]) -> str:
    """Return the rows as a table, and what they add up to."""
    lines = ["| file | codec | frames in it | key frames | compared | exact |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.name} | {r.facts.codec} | {r.facts.num_frames} | {len(r.facts.key_frames)} | {r.compared} | {r.exact} |"
        for r in rows
    ]
    compared, exact = sum(row.compared for row in rows), sum(row.exact for row in rows)
    return "\n".join([*lines, f"| {len(rows)} files | | | | {compared:,} | {exact:,} |"])


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    num_draws, first_seed = (given + [8, 7][len(given) :])[:2]
    found = [
        run(list(FILES), draws=num_draws, seed=first_seed + number, start_method=method)
        for number, method in enumerate(("fork", "spawn"))
    ]
    both = [
        one._replace(compared=one.compared + other.compared, exact=one.exact + other.exact)
        for one, other in zip(*found, strict=True)
    ]
    print(table(both))
    sys.exit(any(row.exact < row.compared for row in both))
