"""Sound as pictures. Axes: T times, M mel bands, S steps, N samples."""

import io

import av
import numpy as np
import pytest
import torch
from clips import clip
from fixed_weights import wave as numbers
from tones import RATE, tone, with_sound

from vlp.data.decode import DecodeError
from vlp.data.fields import ClipReader, Clips
from vlp.data.sampling import Segments
from vlp.data.shards import Raw, write_shards
from vlp.data.sound import HIGHEST, LOWEST, LogMel, log_mel
from vlp.types import Reason

# torchaudio 2.11: compliance.kaldi.fbank, Hann windows, no dither, 23 bands; windows 0, 4, 8 and bands 0, 5, 11, 22
KALDI_NUMBERS = [
    [-15.2290, -8.0744, -14.8141, -15.9424],
    [-11.1386, -8.5572, -15.1959, -15.9424],
    [-13.3998, -8.2707, -14.9497, -15.9424],
]


def look(data: bytes, *times_s: float, steps: int = 40, bands: int = 32) -> np.ndarray:
    return LogMel(num_mel=bands, num_steps=steps)(data, np.array(times_s or (0.5,)), short_side=None).frames


def loudest_band(picture: np.ndarray) -> int:
    return int(picture[..., 0].astype(float).mean(1).argmax())


def band_of(hertz: float, bands: int) -> float:
    """The band whose centre is nearest on the mel scale, by hand."""
    low, high, at = (1127 * np.log(1 + f / 700) for f in (20, 8000, hertz))
    return (at - low) / ((high - low) / (bands + 1)) - 1


@pytest.mark.parametrize(
    ("container", "codec", "video"),
    [
        ("mp4", "aac", "libx264"),
        ("matroska", "flac", "libx264"),
        ("webm", "libopus", "libvpx"),
        ("avi", "pcm_s16le", "mpeg4"),
        ("mpegts", "libmp3lame", "libx264"),
    ],
)
def test_a_tone_is_a_line_at_its_pitch_whatever_holds_it(container, codec, video):
    for hertz in (300.0, 1000.0, 3000.0):
        data = with_sound(tone(hertz), container=container, codec=codec, video=video)
        picture = look(data)[0]
        assert picture.shape == (32, 40, 3) and picture.dtype == np.uint8
        assert abs(loudest_band(picture) - band_of(hertz, 32)) <= 1


def test_a_sound_is_found_where_it_is_in_time():
    wave = np.concatenate([tone(400, 1.0), np.zeros(RATE, np.float32), tone(2000, 1.0)])
    picture = look(with_sound(wave, container="matroska", codec="flac"), steps=298)[0]
    parts = [picture[:, 5:90], picture[:, 110:190], picture[:, 210:290]]
    assert [part.max() for part in parts][1] < 20 < min(parts[0].max(), parts[2].max())
    assert loudest_band(parts[0]) < loudest_band(parts[2])


def test_bands_are_those_of_kaldi():
    mel = log_mel(0.3 * numbers((1680,), 5), num_mel=23)
    assert mel.shape == (9, 23)
    expected = torch.tensor(KALDI_NUMBERS)
    torch.testing.assert_close(mel[[0, 4, 8]][:, [0, 5, 11, 22]], expected, atol=2e-4, rtol=2e-4)


def test_levels_are_the_logarithms_between_black_and_white():
    picture = look(with_sound(tone(1000), container="matroska", codec="flac"), steps=98, bands=20)[0]
    with av.open(io.BytesIO(with_sound(tone(1000), container="matroska", codec="flac"))) as file:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=16_000)
        frames = [out for frame in file.decode(audio=0) for out in resampler.resample(frame)] + resampler.resample(None)
    mel = log_mel(torch.from_numpy(np.concatenate([frame.to_ndarray()[0] for frame in frames])), num_mel=20)[:98]
    seen = torch.from_numpy(picture[..., 1].astype(np.float32)).T / 255 * (HIGHEST - LOWEST) + LOWEST
    assert (seen - mel).abs().max() < 0.06


def test_long_sounds_show_their_thirds_as_colours_from_packets_of_those_windows_alone():
    glide = np.concatenate([tone(200 * 2 ** (k / 3), 0.5) for k in range(12)])  # 6 s
    data = with_sound(glide, container="mp4", codec="aac")
    early, late = look(data, 0.1, 5.9, steps=50)
    for picture in (early, late):
        bands = [loudest_band(picture[..., [colour]]) for colour in range(3)]
        assert bands == sorted(bands) and bands[0] < bands[2]
    assert loudest_band(early[..., [0]]) < loudest_band(late[..., [0]])
    whole = look(data, steps=598)[0][..., 0].astype(float)
    window = early[..., 2].astype(float)
    nearest = min(np.abs(whole[:, start : start + 50] - window).mean() for start in range(360, 420))
    assert nearest < 3.0  # levels: the same sound, decoded from the middle on


def test_short_sounds_are_repeated():
    picture = look(with_sound(tone(500, 0.5, beep_s=0.1), container="matroska", codec="flac"), steps=120)[0]
    assert np.array_equal(picture[:, :48], picture[:, 48:96]) and picture.min() < picture.max()


def test_what_has_no_sound_says_so():
    refused = with_sound(tone(300), container="avi", codec="pcm_alaw", video="mpeg4")
    for data, detail in ((clip(), "there is no sound stream"), (refused, "pcm_alaw is none of aac")):
        with pytest.raises(DecodeError, match=f"no_sound .{detail}"):
            look(data)
    with pytest.raises(DecodeError, match="video_broken"):
        look(b"nothing of this is a file" * 9)


def test_a_reader_gives_pictures_of_sound_and_tombstones_without(tmp_path):
    made = [
        Raw("a", with_sound(tone(440)), "mp4", {"captions": ["a tone"]}),
        Raw("b", clip(), "mp4", {"captions": ["none"]}),
    ]
    write_shards(iter(made), str(tmp_path), prefix="x", max_samples_per_shard=2)
    clips = Clips(Segments(num_frames=1), [], 64, decoder=LogMel(num_mel=16, num_steps=30))
    reader = ClipReader([str(tmp_path / "x-000000.tar")], clips=clips, seed=0, source=0, train=True)
    assert reader.shape == (1, 16, 30, 3)
    first, second = reader.read(0, 0), reader.read(1, 0)
    assert (first.status, second.status) == (Reason.OK, Reason.NO_SOUND)
    assert first.frames.shape == second.frames.shape and first.frames.any() and not second.frames.any()
