"""Lists of JPEG frames, and videos that are cheap to decode, written by a recipe and read as training reads them."""

import shutil
import subprocess

import numpy as np
import pytest
from clips import clip, numbers
from recipe_runs import run, samples

from data_recipes.encode import Encoding, stored
from vlp.data.decode import decode
from vlp.data.probe import probe
from vlp.data.sampling import Segments

LONG = clip(60, layout="va")  # two seconds


def frames_of(made, num: int):
    times_s = Segments(num_frames=num)(made.facts.duration_s, made.facts.fps, None)
    return decode(made.video, times_s, short_side=None, key_frames=made.facts.key_frames)


@pytest.mark.parametrize(("span", "first", "step"), [(None, 0, 12), ((0.5, 1.5), 15, 6)])
def test_frames_are_evenly_spaced_and_keep_their_times(span, first, step):
    made = stored(LONG, "mp4", span=span, encoding=Encoding(num_frames=5))
    assert (made.facts.codec, made.facts.num_frames, made.extension) == ("mjpeg", 5, "mp4")
    decoded = frames_of(made, 5)
    assert numbers(decoded.frames) == [first + step * i for i in range(5)]
    np.testing.assert_allclose(decoded.times_s, np.arange(5) * step / 30, atol=1e-3)
    assert made.facts.duration_s == pytest.approx(5 * step / 30, abs=1e-3)


def test_every_frame_is_a_key_frame_and_there_is_no_sound():
    made = stored(LONG, "mp4", span=None, encoding=Encoding(num_frames=7))
    assert len(made.facts.key_frames) == 7 and b"soun" not in made.video


def test_fewer_frames_than_asked_for_are_stored_as_they_are():
    made = stored(clip(4), "mp4", span=None, encoding=Encoding(num_frames=9))
    assert numbers(frames_of(made, 4).frames) == [0, 1, 2, 3]


def test_colors_are_those_of_the_video():
    one = decode(LONG, np.zeros(1), short_side=None).frames[0].astype(int)
    two = frames_of(stored(LONG, "mp4", span=None, encoding=Encoding(num_frames=5)), 5).frames[0]
    assert np.abs(one - two).mean() < 3


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg command")
def test_plain_tools_take_the_jpegs_out(tmp_path):
    (tmp_path / "x.mp4").write_bytes(stored(LONG, "mp4", span=None, encoding=Encoding(num_frames=3)).video)
    command = ["ffmpeg", "-v", "error", "-i", "x.mp4", "-c", "copy", "-f", "image2", "%d.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert all(probe((tmp_path / f"{i}.jpg").read_bytes()).codec == "mjpeg" for i in (1, 2, 3))


def test_tuned_videos_have_nothing_that_makes_decoding_dear():
    video = stored(LONG, "mp4", span=None, encoding=Encoding(tune="fastdecode", gop=12, short_side=32)).video
    assert b"cabac=0" in video and b"deblock=0" in video and b"keyint=12" in video
    assert len(probe(video).key_frames) == 5


def test_a_recipe_writes_lists_of_frames(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(LONG)
    (tmp_path / "videos" / "a.txt").write_text("a clip\n")
    assert run("folder", tmp_path / "videos", "--holdout", 0, "--store", "frames", "--frames", 4) == 0
    facts = samples(tmp_path / "out", "train")["a"].facts
    assert (facts.codec, facts.num_frames) == ("mjpeg", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--store", "frames"), "write --store frames --frames N"),
        (("--frames", 3), "write --store frames --frames N"),
        (("--store", "frames", "--frames", 3, "--gop", 12), "--gop and --tune are of videos"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, capsys, options, message):
    (tmp_path / "videos").mkdir()
    assert run("folder", tmp_path / "videos", *options) == 78
    assert message in capsys.readouterr().err
