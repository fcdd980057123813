import io
import resource
import socket
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from clips import clip, image, remux, rotated
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.data.probe import Limits, ProbeError, probe
from vlp.types import Reason

REAL = Path(__file__).parents[2] / "shared" / "real_clips"
SOUND_ONLY = clip(8, layout="a")
B_FRAMES = {"bf": "2", "g": "12", "x264-params": "scenecut=0"}


def faststart(data: bytes, path: Path) -> bytes:
    """Move the header of an mp4 before its frames, as for the web; FFmpeg needs a real file for that."""
    with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        copy = output.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size]:
            packet.stream = copy
            output.mux(packet)
    return path.read_bytes()


def refused(data: bytes, **limits) -> ProbeError:
    with pytest.raises(ProbeError) as caught:
        probe(data, Limits(**limits))
    assert caught.value.detail and "\n" not in caught.value.detail
    return caught.value


@pytest.mark.parametrize(
    ("codec", "container", "name"),
    [
        ("libx264", "mp4", "h264"),
        ("libx264", "mov", "h264"),
        ("libx264", "matroska", "h264"),
        ("libx264", "mpegts", "h264"),
        ("libvpx", "webm", "vp8"),
        ("libvpx-vp9", "webm", "vp9"),
        ("mpeg4", "avi", "mpeg4"),
        ("libsvtav1", "mp4", "av1"),
    ],
)
def test_facts_equal_what_was_encoded(codec, container, name):
    facts = probe(clip(25, size=(96, 64), codec=codec, container=container))
    assert (facts.width, facts.height, facts.num_frames, facts.codec, facts.rotation) == (96, 64, 25, name, 0)
    assert facts.duration_s == pytest.approx(25 / 30, abs=2e-3) and facts.fps == pytest.approx(30, abs=0.1)


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "3", "b-adapt": "0"}])
def test_key_frames_start_and_count_equal_those_of_a_full_decode(options):
    data = remux(clip(37, options={**options, "g": "10", "sc_threshold": "0"}), shift=450)
    facts = probe(data)
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    assert facts.key_frames.tolist() == [frame.pts for frame in frames if frame.key_frame]
    assert facts.key_frames.dtype == np.int64 and len(facts.key_frames) == 4
    assert (facts.start_s, facts.num_frames) == (pytest.approx(frames[0].time), len(frames))


def test_variable_rate_and_a_single_frame_have_a_duration():
    facts = probe(clip(pts=[0, 20, 200, 220, 600]))
    assert facts.num_frames == 5 and 1.0 < facts.duration_s < 1.4 and facts.fps == pytest.approx(5 / facts.duration_s)
    one = probe(clip(1))
    assert one.num_frames == 1 and 0 < one.duration_s < 0.1


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_that_of_the_decoded_frames_and_sizes_are_coded(degrees):
    data = rotated(clip(3, size=(96, 64)), degrees)
    with av.open(io.BytesIO(data)) as container:
        expected = next(container.decode(video=0)).rotation % 360
    facts = probe(data)
    assert (facts.rotation, facts.width, facts.height) == (expected, 96, 64)


@pytest.mark.parametrize("codec", ["png", "mjpeg", "libwebp"])
def test_a_still_image_is_one_frame_without_duration(codec):
    facts = probe(image(codec, size=(35, 21)))
    assert facts[:6] == (35, 21, 1, 0.0, 0.0, 0)
    assert facts.codec == codec.removeprefix("lib") and facts.start_s == 0


def test_sound_is_passed_over_and_a_second_video_too():
    assert probe(clip(8, layout="avw")).num_frames == 8
    assert refused(SOUND_ONLY).reason == Reason.NO_VIDEO_STREAM


@pytest.mark.parametrize(
    "data", [b"\0", b"<html>404</html>", b"#EXTM3U\n", b"ffconcat version 1.0\n", b"ID3\4", bytes(999)]
)
def test_what_is_no_video_is_broken(data):
    assert refused(data).reason == Reason.VIDEO_BROKEN
    assert refused(b"").reason == Reason.VIDEO_EMPTY


def test_a_playlist_inside_an_mp4_name_or_box_opens_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.ts"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}\n".encode()
        for data in (
            playlist,
            b"\0\0\0\x10ftypisom" + bytes(4) + playlist,
            f"ffconcat version 1.0\nfile {url}\n".encode(),
        ):
            assert refused(data).reason == Reason.VIDEO_BROKEN
        with pytest.raises(TimeoutError):
            listener.accept()


def test_codecs_outside_the_list_are_refused():
    data = clip(3, codec="ffv1", container="matroska")
    assert refused(data).reason == Reason.CODEC_REFUSED and "ffv1" in refused(data).detail
    assert refused(clip(3), codecs=("vp9",)).reason == Reason.CODEC_REFUSED


@pytest.mark.parametrize(
    "limits", [{"max_pixels": 6143}, {"max_frames": 24}, {"max_seconds": 0.8}, {"max_bytes": 1000}, {"max_frames": 1}]
)
def test_each_limit_is_kept(limits):
    data = clip(25, size=(96, 64))
    assert refused(data, **limits).reason == Reason.LIMIT_EXCEEDED
    assert probe(data, Limits(max_pixels=6144, max_frames=25, max_seconds=0.9, max_bytes=len(data))).num_frames == 25


@pytest.mark.parametrize("container", ["matroska", "mpegts", "mp4"])
def test_the_limit_of_frames_holds_while_packets_are_read(container):
    options = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else None
    data = remux(clip(25), container=container, options=options)
    assert refused(data, max_frames=24).reason == Reason.LIMIT_EXCEEDED


@pytest.mark.parametrize("container", ["matroska", "avi", "faststart", "mp4"])
def test_a_file_cut_anywhere_is_truncated_or_broken(tmp_path, container):
    moved = container == "faststart"
    data = clip(12, container="mp4" if moved else container, codec="mpeg4" if container == "avi" else "libx264")
    data = faststart(data, tmp_path / "x.mp4") if moved else data
    assert probe(data).num_frames == 12
    reasons = [refused(data[:at]).reason for at in range(len(data) // 64, len(data), len(data) // 64)]
    assert set(reasons) <= {Reason.VIDEO_TRUNCATED, Reason.VIDEO_BROKEN, Reason.CODEC_REFUSED, Reason.NO_VIDEO_STREAM}
    assert refused(data[:-1]).reason == Reason.VIDEO_TRUNCATED


def test_a_file_that_does_not_say_where_it_ends_is_truncated_at_the_cut_packet(tmp_path):
    data = faststart(clip(12), tmp_path / "x.mp4")
    at = data.index(b"mdat") - 4
    data = data[:at] + bytes(4) + data[at + 4 :]  # size 0: up to the end of the file
    assert probe(data).num_frames == 12
    assert refused(data[: len(data) - 99]).reason == Reason.VIDEO_TRUNCATED


def test_frames_before_the_first_that_decodes_are_not_counted():
    data = remux(clip(30, options={"bf": "0", "g": "10", "sc_threshold": "0"}), first=4)
    facts = probe(data)
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    assert facts.num_frames == len(frames) == 20 and facts.start_s == pytest.approx(frames[0].time)


def test_frames_of_noise_are_broken_though_the_container_is_whole():
    data = clip(12)
    start = data.index(b"mdat") + 4
    stop = data.index(b"moov") - 4
    noise = np.random.default_rng(0).integers(0, 256, stop - start, np.uint8).tobytes()
    assert refused(data[:start] + noise + data[stop:]).reason == Reason.VIDEO_BROKEN


def test_a_stream_without_packets_is_broken():
    data = clip(3)
    for box, at in ((b"stsz", 12), (b"stts", 8), (b"stsc", 8), (b"stco", 8), (b"stss", 8)):
        place = data.index(box) + at
        data = data[:place] + bytes(4) + data[place + 4 :]
    assert refused(data).reason == Reason.VIDEO_BROKEN


def numbers(data: bytes, box: bytes, at: int, *values: int) -> bytes:
    """Overwrite 32-bit numbers of the first box of a type, `at` bytes after its type."""
    place = data.index(box) + 4 + at
    return data[:place] + struct.pack(f">{len(values)}I", *values) + data[place + 4 * len(values) :]


def table_bomb(count: int) -> bytes:
    data = numbers(numbers(clip(8), b"stsz", 4, 100, count), b"stsc", 12, count)
    return numbers(data, b"stts", 8, count)


FRAGMENTED = remux(clip(8), options={"movflags": "frag_keyframe+empty_moov"})
BOMBS = {
    "samples": table_bomb(100_000_000),
    "times": numbers(clip(8), b"stts", 8, 4_000_000_000),
    "fragment": numbers(FRAGMENTED, b"trun", 0, 0, 1 << 30),
    "edits": numbers(table_bomb(2_000_000), b"elst", 4, 1000),
    "picture": image("png")[:16] + struct.pack(">II", 60_000, 60_000) + image("png")[24:],
    "boxes": clip(8) + b"\0\0\0\x08free" * 1_000_001,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_memory_is_taken(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(BOMBS[name]).reason == Reason.LIMIT_EXCEEDED
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_pictures_above_the_limit_are_not_decoded():
    # VIDEO_BROKEN and not LIMIT_EXCEEDED: the decoder has refused, no frame came out whose size could be checked.
    assert refused(image("mjpeg", size=(800, 600)), max_pixels=1000).reason == Reason.VIDEO_BROKEN
    assert refused(image("mjpeg", size=(80, 60)), max_pixels=4799).reason == Reason.LIMIT_EXCEEDED
    assert probe(image("mjpeg", size=(80, 60)), Limits(max_pixels=4800)).num_frames == 1


def test_a_long_uncompressed_sound_track_is_no_bomb():
    from vlp.data.probe import _track_samples

    def table(*rows):
        return np.array(rows, np.int64)

    sound = {b"hdlr": b"soun", b"stts": table((200_000_000, 1)), b"stsz": 200_000_000, b"stsc": table((1, 1024, 1))}
    assert _track_samples(sound | {b"stco": 195_313}) == 195_313
    assert _track_samples(sound | {b"hdlr": b"vide"}) == 200_000_000
    assert _track_samples(sound | {b"stco": 9, b"stsc": table((1, 2**31, 1))}) == 9 << 21


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["mp4", "matroska", "png"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=8)), min_size=1, max_size=5),
)
def test_any_edited_file_gives_facts_or_a_probe_error(kind, edits):
    data = {"mp4": FRAGMENTED, "matroska": remux(FRAGMENTED, container="matroska"), "png": image("png")}[kind]
    for place, new in edits:
        at = int(place * len(data))
        data = data[:at] + new + data[at + len(new) :]
    try:
        facts = probe(data, Limits(max_pixels=1 << 20, max_frames=1000))
    except ProbeError as error:
        assert error.reason != Reason.OK and "\n" not in error.detail
        return
    assert facts.num_frames >= 1 and 0 < facts.width * facts.height <= 1 << 20 and facts.duration_s >= 0


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/real_clips is not there")
def test_facts_of_real_web_clips_equal_a_full_decode():
    for path in sorted(REAL.glob("*.mp4"))[:4]:
        facts = probe(path.read_bytes())
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        assert facts.num_frames == len(frames) and facts.start_s == pytest.approx(frames[0].time)
        assert facts.duration_s == pytest.approx(float(frames[-1].time - frames[0].time) + 1 / facts.fps, abs=1e-3)
        assert set(facts.key_frames.tolist()) == {frame.pts for frame in frames if frame.key_frame}
