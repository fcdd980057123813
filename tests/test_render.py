import io
import os
import subprocess
import sys

import av
import numpy as np
import pytest

from vlp.data.render import SHAPES, encode_h264, render
from vlp.data.scene import COLOURS, Scene, scene, tracks

SCENES = [scene(0, index, "train") for index in range(400)]


def alone(kind: str) -> Scene:
    """The first scene in which one object does one thing."""
    return next(one for one in SCENES if len(one.objects) == len(one.events) == 1 and one.events[0].kind == kind)


def watched(clip: Scene) -> np.ndarray:
    return render(clip, size=64, num_frames=16)


def pixels_of(frames: np.ndarray, colour: str) -> list[np.ndarray]:
    """Places [N, 2] (y, x) of the pixels of each frame that look like this colour and like no other."""
    table = np.array(list(COLOURS.values()), dtype=np.float64)
    gaps = np.linalg.norm(frames[..., None, :].astype(np.float64) - table, axis=-1)  # [T, H, W, C]
    mine = list(COLOURS).index(colour)
    return [np.argwhere((gap.argmin(-1) == mine) & (gap[..., mine] < 75)) for gap in gaps]


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_render_is_the_same_for_the_same_scene_and_differs_for_another():
    first = render(SCENES[0], size=48, num_frames=5)
    assert first.shape == (5, 48, 48, 3) and first.dtype == np.uint8
    assert (first == render(SCENES[0], size=48, num_frames=5)).all()
    assert (abs(first.astype(int) - render(SCENES[1], size=48, num_frames=5)) > 12).mean() > 0.3  # another background


@pytest.mark.parametrize(
    ("size", "num_frames", "words"), [(63, 4, "size=63"), (16, 4, "size=16"), (64, 1, "num_frames=1")]
)
def test_render_refuses_sizes_that_cannot_be_encoded(size, num_frames, words):
    with pytest.raises(ValueError, match=words):
        render(SCENES[0], size=size, num_frames=num_frames)


@pytest.mark.parametrize(("kind", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_object_moves_on_the_screen_as_the_caption_says(kind, axis, sign):
    clip = alone(kind)
    centres = [places.mean(0) for places in pixels_of(watched(clip), clip.objects[0].colour)]
    way = centres[-1] - centres[0]
    assert sign * way[axis] > 10 and abs(way[1 - axis]) < 2


@pytest.mark.parametrize(("kind", "sign"), [("clockwise", 1), ("anticlockwise", -1)])
def test_object_goes_around_as_the_caption_says(kind, sign):
    clip = alone(kind)
    centres = np.array([places.mean(0) for places in pixels_of(watched(clip), clip.objects[0].colour)])
    y, x = (centres - (centres.max(0) + centres.min(0)) / 2).T
    turned = np.diff(np.unwrap(np.arctan2(y, x))).sum()  # y points down, so that growing angles are clockwise
    assert 5 < sign * turned < 7


@pytest.mark.parametrize(("kind", "larger"), [("grow", -1), ("shrink", 0), ("appear", -1), ("vanish", 0)])
def test_object_changes_its_area_as_the_caption_says(kind, larger):
    clip = alone(kind)
    areas = [len(places) for places in pixels_of(watched(clip), clip.objects[0].colour)]
    assert areas[larger] > 2 * areas[-1 - larger]


def test_object_turns_to_the_colour_of_the_caption():
    clip = alone("turn")
    frames, new = watched(clip), clip.events[0].colour
    before, after = pixels_of(frames, clip.objects[0].colour), pixels_of(frames, new)
    assert len(before[0]) > 5 * len(after[0]) and len(after[-1]) > 5 * len(before[-1])


def test_object_rests_outside_its_span():
    clip = next(one for one in SCENES if one.events[-1].kind == "stop")
    centres = np.array([places.mean(0) for places in pixels_of(watched(clip), clip.objects[0].colour)])
    rest = int(np.ceil(clip.events[1].start_s * 6))
    assert np.ptp(centres[rest:], axis=0).max() < 1 < np.ptp(centres[:rest], axis=0).max()


def test_background_does_not_depend_on_the_events():
    clip = alone("left")
    moved = clip._replace(events=(clip.events[0]._replace(kind="right"),))
    frames, others = watched(clip), watched(moved)
    same = (frames == others).all(-1).mean((1, 2))
    assert same.min() > 0.75 and (frames[-1] != others[-1]).any()


@pytest.mark.parametrize("shape", list(SHAPES))
def test_shapes_fill_a_similar_area_inside_their_keep_out(shape):
    y, x = np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-2, 2, 401), indexing="ij")
    inside = SHAPES[shape](x, y) < 0
    assert np.hypot(x, y)[inside].max() < 1.25 and 1.6 < inside.mean() * 16 < 3.5


def test_object_stands_where_its_track_says():
    for clip in (one for one in SCENES[:40] if one.objects[0].shape in ("circle", "square", "cross", "ring")):
        if clip.events[0].kind not in ("turn", "appear", "vanish") and clip.events[-1].kind not in ("turn", "vanish"):
            track, places = tracks(clip, 16)[0], pixels_of(watched(clip), clip.objects[0].colour)
            centres = np.array([place.mean(0) for place in places])
            assert abs(centres - np.stack([track.y, track.x], 1) * 64).max() < 2


def test_encoding_gives_equal_bytes_and_keeps_the_picture():
    frames = render(SCENES[2])
    data = encode_h264(frames, fps=12)
    assert data == encode_h264(frames, fps=12) and len(data) < 60_000
    assert b"Lavf" not in data  # no version of the container's writer
    back = decoded(data)
    assert back.shape == frames.shape and abs(back.astype(int) - frames).mean() < 6


def test_encoding_uses_one_thread_for_large_pictures():
    assert b"threads=1 " in encode_h264(np.zeros((2, 512, 512, 3), dtype=np.uint8), fps=12)


def test_encoding_does_not_depend_on_what_was_in_memory():
    code = (
        "import hashlib; from vlp.data.render import render, encode_h264; from vlp.data.scene import scene;"
        "clips = [render(scene(0, index, 'train'), size=64, num_frames=8) for index in range(12)];"
        "print(hashlib.sha256(b''.join(encode_h264(clip, fps=12) for clip in clips)).hexdigest())"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    fills = ("17", "99", "200")  # what glibc writes into memory before it hands it out
    places = [os.environ | {"PYTHONPATH": root, "MALLOC_PERTURB_": fill} for fill in fills]
    assert len({subprocess.check_output([sys.executable, "-c", code], env=place) for place in places}) == 1


@pytest.mark.parametrize("fps", [12.0, 12.5, 30000 / 1001])
def test_encoding_keeps_rate_codec_and_key_frames(fps):
    with av.open(io.BytesIO(encode_h264(render(SCENES[3], size=64, num_frames=26), fps=fps))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and abs(float(stream.average_rate or 0) - fps) < 0.01
        assert stream.frames == 26 and sum(packet.is_keyframe for packet in container.demux(stream)) >= 3
