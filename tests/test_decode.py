"""Decoding against an independent full decode of the same real files; frames are recognised by their barcode."""

import contextlib
import gc
import io
import itertools
import pathlib
import pickle
import random
import resource
from functools import cache

import av
import clips
import numpy as np
import pytest
import torch

from vlp.data import decode as module
from vlp.data import gop
from vlp.data.container import container_format, first_video, has_cuts, open_container
from vlp.data.decode import DecodeError, decode
from vlp.data.probe import LIMITS, probe
from vlp.data.sampling import Segments
from vlp.types import Reason

REAL_CLIPS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "real_clips"
GOP12 = {"g": "12", "bf": "3", "sc_threshold": "0"}
OPEN = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
X265 = "keyint=12:min-keyint=12:bframes=3:log-level=none"


def hevc(more: str = "", **kwargs) -> bytes:
    return clips.clip(48, codec="libx265", options={"x265-params": X265 + more}, **kwargs)


def b_frames(num_frames: int = 48, **kwargs) -> bytes:
    return clips.clip(num_frames, options=GOP12, **kwargs)


def from_second_key(data: bytes) -> bytes:
    with av.open(io.BytesIO(data)) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    return clips.remux(data, first=keys[1], container="matroska")


VFR = [0, 20, 40, 100, 110, 120, 300, 310, 320, 330, 400, 600]
# Files that the plan must serve alone.
PLANNED = {
    "b_frames": b_frames,
    "no_b_frames": lambda: clips.clip(48, options={"g": "12", "bf": "0"}),
    "all_intra": lambda: clips.clip(options={"g": "1"}),
    "long_gop": lambda: clips.clip(60, options={"g": "250", "bf": "3"}),
    "open_gop": lambda: clips.clip(48, options=OPEN),
    "open_gop_hevc": lambda: hevc(":open-gop=1"),
    "cut_copy": lambda: clips.remux(clips.clip(48, options=GOP12), first=12, shift=-12 * 20 - 100),
    "start_offset": lambda: clips.remux(b_frames(), shift=900),
    "pause_first": lambda: clips.with_edits(b_frames(), (200, -1), (900, 6 * 640)),
    "variable_rate": lambda: clips.clip(pts=VFR, options={"g": "5", "bf": "2"}),
    "odd_size": lambda: clips.clip(5, size=(95, 63), pix_fmt="yuv444p"),
    "ten_bit": lambda: clips.clip(5, pix_fmt="yuv420p10le"),
    "one_frame": lambda: clips.clip(1),
    "interlaced": lambda: clips.clip(48, options=GOP12 | {"x264-params": "tff=1"}),
    "audio_first_two_videos": lambda: clips.clip(layout="awv"),
    "rotated": lambda: clips.rotated(b_frames(), 90),
    "fragmented": lambda: clips.remux(b_frames(), options={"movflags": "frag_keyframe+empty_moov"}),
    "hevc": hevc,
    "hevc_layers": lambda: hevc(":temporal-layers=3"),
    "vp9_webm": lambda: clips.clip(48, codec="libvpx-vp9", container="webm", options={"g": "12"}),
    "av1": lambda: clips.clip(48, codec="libsvtav1", options={"g": "12", "preset": "10"}),
    "mpeg4_mp4": lambda: clips.clip(codec="mpeg4", options={"g": "12", "bf": "2"}),
    "mkv": lambda: b_frames(container="matroska"),
    "mkv_without_hints": lambda: clips.remux(clips.without_hints(b_frames()), container="matroska"),
    "mkv_without_cues": lambda: clips.remux(b_frames(), container="matroska", options={"live": "1"}),
    "mov": lambda: b_frames(container="mov"),
    "mpegts": lambda: b_frames(container="mpegts"),
    "mpegts_hevc": lambda: hevc(container="mpegts"),
}
# Files where everything is decoded, because nothing less is sure.
IN_FULL = {
    "avi": lambda: clips.clip(codec="mpeg4", container="avi", options={"g": "12", "bf": "2"}),
    "avi_b_frames": lambda: clips.clip(container="avi", options={"g": "12", "bf": "2"}),  # with wrong times inside
    "intra_refresh": lambda: clips.clip(60, options={"g": "12", "bf": "0", "x264-params": "intra-refresh=1"}),
    "parts_swapped": lambda: clips.with_edits(b_frames(), (500, 22 * 640), (500, 6 * 640)),
    "joined_at_open_gop": lambda: from_second_key(clips.clip(48, options=OPEN)),
    "joined_at_open_gop_hevc": lambda: from_second_key(hevc(":open-gop=1")),
    "joined_inside_gop": lambda: clips.remux(b_frames(container="mpegts"), first=5, container="mpegts"),
}


@cache
def made(name: str) -> bytes:
    return (PLANNED | IN_FULL)[name]()


def full_decode(data: bytes, short_side: int, *, timed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Decode and scale every frame; return (times_s from the first, frames [T, H, W, 3])."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = sorted(container.decode(stream), key=lambda frame: frame.pts if timed else 0)  # a stable sort
        tick_s = float(stream.time_base)
    ratio = short_side / min(frames[0].width, frames[0].height)
    size = round(frames[0].width * ratio), round(frames[0].height * ratio)
    scaled = [f.reformat(*size, format="gbrp", interpolation="AREA", threads=1).to_ndarray() for f in frames]
    turned = [np.rot90(image, frame.rotation // 90) for image, frame in zip(scaled, frames, strict=True)]
    return np.array([(frame.pts - frames[0].pts) * tick_s for frame in frames]), np.stack(turned)


def displayed(starts_s: np.ndarray, times_s: np.ndarray, *, late_s: float = 1e-5) -> list[int]:
    return [max([i for i, begin in enumerate(starts_s) if begin <= time_s + late_s], default=0) for time_s in times_s]


def key_table(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.array(sorted(packet.pts for packet in container.demux(video=0) if packet.is_keyframe and packet.size))


def check_against_full_decode(data: bytes, *, short_side: int = 40, num_draws: int = 4) -> None:
    starts_s, images = full_decode(data, short_side)
    for seed in range(num_draws):
        rng = np.random.default_rng(seed)
        times_s = rng.uniform(-0.1, starts_s[-1] + 0.1, rng.integers(1, 9))
        indices = displayed(starts_s, times_s)
        for table in (None, key_table(data)):
            decoded = decode(data, times_s, short_side=short_side, key_frames=table)
            np.testing.assert_array_equal(decoded.frames, images[indices])
            np.testing.assert_allclose(decoded.times_s, starts_s[indices], atol=1e-9)


def refuse(*args, **kwargs):
    raise AssertionError("a full decode was not expected")


@pytest.mark.parametrize("name", PLANNED)
def test_plan_equals_full_decode_bit_for_bit(name, monkeypatch):
    monkeypatch.setattr(module, "_decode_all", refuse)
    check_against_full_decode(made(name))


@pytest.mark.parametrize("name", [name for name in IN_FULL if name != "avi_b_frames"])
def test_files_that_cannot_be_planned_equal_full_decode(name):
    check_against_full_decode(made(name))


@pytest.mark.parametrize("name", PLANNED)
def test_full_decode_of_the_module_equals_the_plan(name):
    data = made(name)
    times_s = np.random.default_rng(0).uniform(-0.1, 1.8, 7)
    planned = decode(data, times_s, short_side=40)
    in_full = module._decode_all(data, times_s, kind=container_format(data), short_side=40)
    np.testing.assert_array_equal(planned.frames, in_full.frames)
    np.testing.assert_allclose(planned.times_s, in_full.times_s)


@pytest.mark.skipif(not REAL_CLIPS.is_dir(), reason="../shared/real_clips is not on this machine")
def test_real_clips_equal_full_decode(monkeypatch):
    monkeypatch.setattr(module, "_decode_all", refuse)
    for path in sorted(REAL_CLIPS.glob("*.mp4")):
        check_against_full_decode(path.read_bytes(), short_side=112, num_draws=1)


NUMBERED = ["b_frames", "open_gop", "long_gop", "rotated", "start_offset", "mkv", "avi", "avi_b_frames", "mpegts"]


@pytest.mark.parametrize("name", NUMBERED)
def test_middle_of_frame_gives_that_frame(name):
    data = made(name)
    num_frames = {"avi": 24, "avi_b_frames": 24, "long_gop": 60}.get(name, 48)
    times_s = (np.arange(num_frames) + 0.5) / 30
    decoded = decode(data, times_s, short_side=48)
    frames = np.rot90(decoded.frames, axes=(1, 2)) if name == "rotated" else decoded.frames
    assert clips.numbers(frames) == list(range(num_frames))
    assert np.abs(decoded.times_s - times_s).max() <= 0.5 / 30 + 1e-3  # half a frame, and the rounding of Matroska


@pytest.mark.parametrize("name", ["b_frames", "open_gop", "start_offset", "mkv", "mpegts", "hevc", "av1", "vp9_webm"])
def test_facts_of_the_index_lead_to_every_frame(name):
    facts = probe(made(name))
    times_s = Segments(num_frames=facts.num_frames)(facts.duration_s, facts.fps, None)
    decoded = decode(made(name), times_s, short_side=48, key_frames=facts.key_frames)
    assert clips.numbers(decoded.frames) == list(range(48))


def test_variable_rate_shows_a_frame_until_the_next_one_starts():
    times_s = np.array([59, 60, 99, 100, 119, 121, 299, 300, 599, 601, 9000]) / clips.CLOCK
    frames = decode(made("variable_rate"), times_s, short_side=48).frames
    assert clips.numbers(frames) == [2, 2, 2, 3, 4, 5, 5, 6, 10, 11, 11]


def test_hidden_frames_of_an_edit_list_do_not_count():
    decoded = decode(made("cut_copy"), np.array([0.0, 0.1]), short_side=48)
    assert clips.numbers(decoded.frames) == [17, 20]  # 12 to 16 stand in the file, to decode 17 from
    np.testing.assert_allclose(decoded.times_s, [0, 0.1])


def test_start_of_frame_gives_that_frame_despite_rounding():
    for name in ("b_frames", "mkv", "avi"):
        times_s = np.arange(24) / 30  # Matroska rounds 2/30 s up to 67 ms
        assert clips.numbers(decode(made(name), times_s, short_side=48).frames) == list(range(24))


def test_times_in_any_order_and_repeated_come_back_in_that_order():
    decoded = decode(made("b_frames"), np.array([1.01, 0.01, -1e300, 1.01, 1e300, 0.5]), short_side=48)
    assert clips.numbers(decoded.frames) == [30, 0, 0, 30, 47, 15]
    assert decoded.frames.dtype == np.uint8 and decoded.frames.flags.c_contiguous and decoded.frames.flags.writeable


def test_first_video_is_decoded_and_no_other_stream():
    data = made("audio_first_two_videos")
    assert clips.numbers(decode(data, np.array([0.0, 0.7]), short_side=48).frames) == [1000, 1021]
    with open_container(data, "mp4", decode_to_probe=True, max_pixels=LIMITS.max_pixels) as container:
        stream = first_video(container)
        assert stream is not None and stream.index == 1
        assert [other.discard.name for other in container.streams] == ["all", "default", "all"]
        assert container.streams[1].codec_context.pix_fmt == "yuv420p"
        assert container.streams[0].codec_context.format is None  # no decoder was allowed to find out


def test_wrong_key_table_is_left_aside():
    data = made("b_frames")
    expected = decode(data, np.array([0.2, 0.9, 1.4]), short_side=40).frames
    for table in ([], [0], [5000], [0, 640 * 25], [0, 640 * 36], [-9999, 0, 10**12]):
        got = decode(data, np.array([0.2, 0.9, 1.4]), short_side=40, key_frames=np.array(table, dtype=np.int64))
        np.testing.assert_array_equal(got.frames, expected)


def test_key_table_is_not_trusted_where_an_edit_list_swaps_parts():
    data = made("parts_swapped")
    starts_s, images = full_decode(data, 40)
    for start_s, image in zip(starts_s, images, strict=True):
        decoded = decode(data, np.array([start_s + 0.01]), short_side=40, key_frames=key_table(data))
        np.testing.assert_array_equal(decoded.frames[0], image)


class SeeksTooFar:
    """A real container whose seek lands one key frame later than asked for."""

    def __init__(self, container) -> None:
        self.real = container

    def __getattr__(self, name: str):
        return getattr(self.real, name)

    def seek(self, ticks: int, *, stream) -> None:
        self.real.seek(ticks + 640 * 12, stream=stream)


def test_seek_that_lands_too_late_is_noticed():
    with module._opened(made("b_frames"), "mp4", decode_to_probe=False) as source:
        source = source._replace(container=SeeksTooFar(source.container))
        first, _ = gop.head(source)
        with pytest.raises(gop.NoPlanError):
            gop.plan(source, first, np.array([640 * 15]), key_frames=key_table(made("b_frames")))


@pytest.mark.parametrize("name", ["b_frames", "mkv"])
def test_key_table_saves_reading_the_rest_of_the_file(name, monkeypatch):
    data, read, demux = made(name), [], gop.demux
    monkeypatch.setattr(gop, "demux", lambda source: (read.append(packet) or packet for packet in demux(source)))
    decode(data, np.array([1.22]), short_side=40, key_frames=key_table(data))
    with_table, _ = len(read), read.clear()
    decode(data, np.array([1.22]), short_side=40)
    assert with_table < 36 and len(read) == 48


def test_plan_decodes_from_the_key_frame_to_the_wanted_frame_and_no_further():
    with module._opened(made("b_frames"), "mp4", decode_to_probe=False) as source:
        first, start = gop.head(source)
        plan = gop.plan(source, first, start + 640 * np.array([13, 14, 40]), key_frames=None)
    assert plan.pts.tolist() == [640 * 13, 640 * 14, 640 * 40] and len(plan.runs) == 2
    assert [run.key // 640 for run in plan.runs] == [12, 36]
    for run in plan.runs:
        assert run.packets[0].is_keyframe and run.packets[-1].pts in run.wanted


def test_leading_picture_of_an_open_gop_needs_the_gop_before():
    with module._opened(made("open_gop"), "mp4", decode_to_probe=False) as source:
        first, _ = gop.head(source)
        packets = [*first, *gop.demux(source)]
        keys = [packet.pts for packet in packets if packet.is_keyframe]
        leading = [q.pts for p, q in itertools.pairwise(packets) if p.pts in keys[1:] and q.pts < p.pts]
        plan = gop._choose(packets, np.array(leading[:1]))
    assert leading and plan.runs[0].key == max(key for key in keys if key < leading[0])


@pytest.mark.parametrize(("name", "drops"), [("b_frames", True), ("hevc", True), ("vp9_webm", False), ("av1", False)])
def test_unreferenced_frames_are_dropped_for_h264_and_hevc_only(name, drops):
    with module._opened(made(name), container_format(made(name)), decode_to_probe=False) as source:
        assert module._drops_unreferenced(source) == drops
        assert source.stream.codec_context.thread_count == 1


def test_unreferenced_frames_are_kept_where_higher_temporal_layers_may_need_them():
    with module._opened(made("hevc_layers"), "mp4", decode_to_probe=False) as source:
        assert not module._drops_unreferenced(source)


def test_dropping_unreferenced_frames_really_drops():
    with module._opened(made("long_gop"), "mp4", decode_to_probe=False) as source:
        first, _ = gop.head(source)
        (run,) = gop.plan(source, first, np.array([640 * 50]), key_frames=None).runs
        context, decoded = source.stream.codec_context, []
        context.skip_frame = "NONREF"
        for packet in [*run.packets, None]:
            decoded += context.decode(packet)
    assert len(decoded) < 0.75 * len(run.packets)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_turns_clockwise_by_what_the_header_says(degrees):
    upright = decode(made("b_frames"), np.array([0.5]), short_side=40).frames[0]
    turned = decode(clips.rotated(made("b_frames"), degrees), np.array([0.5]), short_side=40).frames[0]
    np.testing.assert_array_equal(turned, np.rot90(upright, -degrees // 90))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
    ],
)
def test_mirrors_of_the_display_matrix_are_applied(matrix, expected):
    upright = decode(made("b_frames"), np.array([0.5]), short_side=40).frames[0]
    mirrored = decode(clips.with_matrix(made("b_frames"), matrix), np.array([0.5]), short_side=40).frames[0]
    np.testing.assert_array_equal(mirrored, expected(upright))


def test_frames_of_different_shapes_are_refused(monkeypatch):
    turns = itertools.cycle([lambda image: image, lambda image: image.transpose(1, 0, 2)])
    monkeypatch.setattr(module, "_upright", lambda image, frame: next(turns)(image))
    with pytest.raises(DecodeError, match=r"video_broken \(a frame of \(60, 40, 3\), others of \(40, 60, 3\)\)"):
        decode(made("b_frames"), np.array([0.1, 1.4]), short_side=40)


@pytest.mark.parametrize(
    ("name", "short_side", "shape"),
    [
        ("b_frames", None, (64, 96)),
        ("b_frames", 100, (100, 150)),
        ("odd_size", None, (63, 95)),
        ("odd_size", 21, (21, 32)),
        ("rotated", 32, (48, 32)),
        ("ten_bit", 32, (32, 48)),
    ],
)
def test_short_side_is_scaled_and_the_aspect_ratio_kept(name, short_side, shape):
    frames = decode(made(name), np.array([0.0, 0.1]), short_side=short_side).frames
    assert frames.shape == (2, *shape, 3) and clips.number(np.rot90(frames[0]) if name == "rotated" else frames[0]) == 0


@pytest.mark.parametrize(("color", "matrix"), [("bt709", 1), ("smpte170m", 6)])
def test_colors_follow_the_matrix_that_the_file_names(color, matrix):
    picture = np.full((48, 64, 3), (200, 40, 90), np.uint8)
    data = clips.flat(picture, matrix=matrix)
    frames = decode(data, np.array([0.0]), short_side=24).frames
    assert np.abs(frames.astype(int) - picture[0, 0]).max() <= 4


@pytest.mark.parametrize("codec", ["png", "mjpeg", "libwebp"])
def test_still_image_is_displayed_at_all_times(codec):
    decoded = decode(clips.image(codec), np.array([0.0, 7.0, -1.0]), short_side=12)
    assert decoded.frames.shape == (3, 12, 16, 3) and clips.numbers(decoded.frames) == [5, 5, 5]
    assert decoded.times_s.tolist() == [0, 0, 0]


def test_one_frame_answers_every_time():
    decoded = decode(made("one_frame"), np.array([0.0, 0.02, 5.0]), short_side=48)
    assert clips.numbers(decoded.frames) == [0, 0, 0] and decoded.times_s.tolist() == [0, 0, 0]


BROKEN = {
    "zero_bytes": (lambda: b"", Reason.VIDEO_EMPTY),
    "text": (lambda: b"no video at all" * 99, Reason.VIDEO_BROKEN),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", Reason.VIDEO_BROKEN),
    "header_lost": (lambda: made("b_frames")[:2000], Reason.VIDEO_BROKEN),
    "media_lost": (lambda: clips.header_first(made("b_frames"))[:2000], Reason.VIDEO_BROKEN),
    "audio_only": (lambda: clips.clip(layout="a"), Reason.NO_VIDEO_STREAM),
    "cover_picture": (lambda: clips.with_cover(), Reason.NO_VIDEO_STREAM),
    "refused_codec": (lambda: clips.clip(3, codec="ffv1", container="matroska"), Reason.CODEC_REFUSED),
    "huge": (lambda: clips.declared(made("b_frames"), 16384, 16384), Reason.LIMIT_EXCEEDED),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_file_is_refused_with_its_reason(name):
    make, reason = BROKEN[name]
    with pytest.raises(DecodeError) as caught:
        decode(make(), np.array([0.0]), short_side=40)
    assert caught.value.reason == reason and reason.name.lower() in str(caught.value)


def test_truncated_mp4_gives_its_frames_and_refuses_the_lost_ones():
    whole = clips.header_first(made("b_frames"))
    cut = whole[: len(whole) * 7 // 10]
    _, images = full_decode(whole, 40)
    for table in (None, key_table(whole)):
        decoded = decode(cut, np.array([0.0, 0.5]), short_side=40, key_frames=table)
        np.testing.assert_array_equal(decoded.frames, images[[0, 15]])
        for time_s in (1.3, 99.0):
            with pytest.raises(DecodeError, match="video_truncated"):
                decode(cut, np.array([0.0, time_s]), short_side=40, key_frames=table)


def test_truncated_mkv_ends_where_it_ends():
    data = made("mkv")
    decoded = decode(data[: len(data) // 2], np.array([0.0, 99.0]), short_side=48)
    first, last = clips.numbers(decoded.frames)
    assert first == 0 and 10 < last < 40


def test_size_that_the_header_hides_is_refused_by_the_decoder(monkeypatch):
    monkeypatch.setattr(module, "LIMITS", LIMITS._replace(max_pixels=96 * 64 - 1))
    with pytest.raises(DecodeError, match="limit_exceeded"):
        decode(clips.declared(made("b_frames"), 32, 32), np.array([0.0]), short_side=40)


def test_scaling_cannot_exceed_the_limit_of_pixels():
    thin = clips.image("png", size=(4000, 2))
    assert decode(thin, np.array([0.0]), short_side=None).frames.shape == (1, 2, 4000, 3)
    with pytest.raises(DecodeError, match="limit_exceeded"):
        decode(thin, np.array([0.0]), short_side=224)


def test_more_bytes_than_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(module, "LIMITS", LIMITS._replace(max_bytes=len(made("b_frames")) - 1))
    with pytest.raises(DecodeError, match="limit_exceeded"):
        decode(made("b_frames"), np.array([0.0]), short_side=40)


def test_title_in_a_wrong_encoding_does_not_cost_the_video():
    data = clips.remux(made("b_frames"), title="xxxx").replace(b"xxxx", b"\xff\xfe\x80\xff")
    assert clips.numbers(decode(data, np.array([0.5]), short_side=48).frames) == [15]


@pytest.mark.parametrize("number", [12, 13, 16])
def test_damaged_packet_is_concealed_as_in_a_full_decode(number):
    data = clips.damaged(made("b_frames"), number)
    times_s = np.array([0.1, 0.41, 0.52, 0.73])  # the second GOP begins at 0.4
    decoded = decode(data, times_s, short_side=40)
    in_full = module._decode_all(data, times_s, kind="mp4", short_side=40)
    np.testing.assert_array_equal(decoded.frames, in_full.frames)
    assert clips.number(decode(data, np.array([0.1]), short_side=48).frames[0]) == 3


def test_packet_that_no_decoder_takes_costs_its_frame_only():
    data = made("vp9_webm")
    with av.open(io.BytesIO(data)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
    broken = data.replace(bytes(packet), b"\xff" * packet.size)
    frames = decode(broken, np.array([0.1, 1.02, 1.22]), short_side=48).frames
    assert clips.numbers(frames)[::2] == [3, 36]


def test_time_that_runs_back_is_never_displayed():
    spans = list(module._spans(iter([(0, "a"), (4, "b"), (2, "c"), (6, "d"), (6, "e")])))
    assert spans == [(0, "a", 4), (4, "b", 6), (6, "d", 6), (6, "e", np.inf)]


def test_packets_without_a_time_are_refused():
    with pytest.raises(DecodeError, match="44 of 48 packets have no time"):
        decode(clips.without_times(made("mpegts")), np.array([0.5]), short_side=40)


def test_recording_that_goes_on_with_other_streams_gives_its_first_one():
    ids = {"mpegts_start_pid": "512", "mpegts_pmt_start_pid": "100", "mpegts_service_id": "7"}
    other = clips.remux(made("mpegts"), container="mpegts", options=ids)
    frames = decode(made("mpegts") + other, np.array([0.5, 99.0]), short_side=48).frames
    assert clips.numbers(frames) == [15, 47]


def test_video_may_not_open_other_files():
    container = open_container(made("b_frames"), "mp4", decode_to_probe=False, max_pixels=LIMITS.max_pixels)
    with container, pytest.raises(PermissionError):
        container.io_open("concat:other.mp4", 1, {})


@pytest.mark.parametrize("times_s", [[], [[0.0]], [np.nan], [0.0, np.inf]])
def test_senseless_times_are_a_mistake_of_the_caller(times_s):
    with pytest.raises(ValueError, match="times_s"):
        decode(made("b_frames"), np.array(times_s), short_side=40)


def test_senseless_size_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="short_side=0"):
        decode(made("b_frames"), np.array([0.0]), short_side=0)


@pytest.mark.parametrize("name", ["b_frames", "hevc", "mkv", "mpegts", "avi"])
def test_damaged_file_gives_frames_or_a_decode_error(name):
    data, rng, times_s = made(name), random.Random(0), np.array([0.1, 0.5, 1.1])
    reasons = set()
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 4, 30])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert decode(bytes(damaged[: rng.randint(1, 2 * len(data))]), times_s, short_side=24).frames.shape[0] == 3
        except DecodeError as error:
            reasons.add(error.reason)
    assert Reason.OK not in reasons and (reasons or name == "mpegts")  # there every packet stands for itself


@pytest.mark.parametrize("name", ["parts_swapped", "pause_first", "b_frames"])
def test_has_cuts_sees_several_edits_but_no_first_pause(name):
    assert has_cuts(made(name)) == (name == "parts_swapped")
    assert not has_cuts(b"\x00\x00\x00\x00free") and not has_cuts(b"\x00\x00\x00\x01free" + bytes(99))


class Clips(torch.utils.data.Dataset):
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[int]:
        return clips.numbers(decode(self.data, np.array([index / 6, 1.0]), short_side=48).frames)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_decode_what_this_process_decodes(start):
    data = Clips(made("b_frames"))
    expected = [data[i] for i in range(6)]  # this process has used FFmpeg before it forks
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=start, collate_fn=list
    )
    assert list(loader) == expected == [[5 * i, 30] for i in range(6)]


def test_error_survives_the_way_out_of_a_worker():
    error = pickle.loads(pickle.dumps(DecodeError(Reason.CODEC_REFUSED, "ffv1")))
    assert error.reason == Reason.CODEC_REFUSED and str(error) == "codec_refused (ffv1)"


@pytest.mark.parametrize("name", ["b_frames", "rotated", "avi"])
def test_nothing_waits_for_the_garbage_collector(name):
    decode(made(name), np.array([0.1, 0.5]), short_side=40)
    gc.collect()
    gc.disable()
    try:
        decode(made(name), np.array([0.1, 0.5]), short_side=40)
        assert gc.collect() == 0  # a cycle would keep whole frames
    finally:
        gc.enable()


@pytest.mark.slow
def test_memory_does_not_grow_over_thousands_of_decodes():
    names, sizes = ["b_frames", "hevc", "avi", "mkv", "rotated"], []
    for i in range(10_000):
        data = made(names[i % len(names)])
        with contextlib.suppress(DecodeError):
            decode(data if i % 7 else data[:-100], np.array([0.1, 0.6]), short_side=40)
        if i >= 2000:
            sizes.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert max(sizes[-500:]) - max(sizes[:500]) < 4 << 20
