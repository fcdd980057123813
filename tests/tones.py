"""Small real files with pictures and sound, encoded in memory."""

import io
from fractions import Fraction

import av
import numpy as np

RATE = 32_000


def tone(hertz: float, seconds: float = 1.0, *, beep_s: float | None = None) -> np.ndarray:
    """Return float32 [N] at RATE; with `beep_s`, on and off for so long in turn."""
    at = np.arange(round(seconds * RATE)) / RATE
    wave = 0.4 * np.sin(2 * np.pi * hertz * at)
    return (wave * ((at // beep_s) % 2 == 0) if beep_s else wave).astype(np.float32)


def with_sound(wave: np.ndarray, *, container: str = "mp4", codec: str = "aac", video: str = "libx264") -> bytes:
    """Return 4 black frames a second for as long as the sound lasts, and the sound."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        pictures = output.add_stream(video, rate=Fraction(4))
        pictures.width = pictures.height = 32
        pictures.pix_fmt = "yuv420p"
        sound = output.add_stream(codec, rate=RATE if codec != "libopus" else 48_000, layout="mono")
        for number in range(max(1, round(4 * len(wave) / RATE))):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * number % 200, np.uint8), format="rgb24")
            output.mux(pictures.encode(frame))
        output.mux(pictures.encode())
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        output.mux(sound.encode(frame))
        output.mux(sound.encode())
    return file.getvalue()
