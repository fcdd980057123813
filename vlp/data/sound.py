"""The sound of a clip as a picture: a log-mel spectrogram around each wanted time.

    bytes --demuxer--> packets of the first sound stream --codec, those of the window only--> samples, one channel
          --windows of 25 ms every 10 ms, power, mel bands, logarithm--> [T, mel bands, steps, 3] uint8

Axes: T wanted times, N samples, S steps of 10 ms, F frequencies of a spectrum, M mel bands.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Discard
from einops import rearrange
from torch import Tensor

from vlp.data.container import open_container
from vlp.data.decode import Decoded, DecodeError, kind_of
from vlp.data.probe import LIMITS
from vlp.types import Reason

CODECS = frozenset({"aac", "mp3", "opus", "vorbis", "flac", "pcm_s16le", "ac3"})
RATE = 16_000  # samples a second
WINDOW, HOP = 400, 160  # samples: 25 ms every 10 ms
LOWEST, HIGHEST = -16.0, 10.0  # natural logarithm of the energy of a band that is black, and that is white
_LOWEST_HZ = 20.0
_PREEMPHASIS = 0.97
_SMALLEST = torch.finfo(torch.float32).eps  # energy of silence; its logarithm is above LOWEST
_LEAD_S = 0.25  # decoded before a window: a decoder that starts in the middle needs some packets
_SLACK_S = 1.0  # longer than the picture: decoded as a whole, for containers round how long a sound is


class LogMel:
    """Spectrograms as pictures of `num_mel` x `num_steps` pixels, low tones in the first row.

    A sound that is longer than the picture is shown three times, as colours: from its first, middle and last third, at
    the place in the third that the wanted time has in the clip. A shorter one is repeated until the picture is full.

    Args:
        num_mel: bands. num_steps: of 10 ms.

    Source: arXiv:2310.01852, 3.1 and its code. Deviations: 256 levels of 0.1 instead of numbers; all channels are
    averaged, there the first one is taken.
    """

    def __init__(self, *, num_mel: int = 126, num_steps: int = 1036) -> None:
        if min(num_mel, num_steps) < 1:
            raise ValueError(f"num_mel={num_mel} and num_steps={num_steps} must be at least 1.")
        self.num_mel, self.num_steps = num_mel, num_steps
        self.height, self.width = num_mel, num_steps

    def __call__(
        self, data: bytes, times_s: np.ndarray, *, short_side: int | None, key_frames: np.ndarray | None = None
    ) -> Decoded:
        """Return pictures at `times_s` [T], seconds; `short_side` and `key_frames` are of video and not used.

        Raises:
            DecodeError: NO_SOUND where there is no sound stream, none of CODECS, or nothing that decodes.
        """
        try:
            pictures = self._pictures(data, np.asarray(times_s, dtype=np.float64))
        except (FFmpegError, OverflowError) as error:
            raise DecodeError(Reason.NO_SOUND, str(error)) from error
        return Decoded(np.stack(pictures), np.asarray(times_s, dtype=np.float64))

    def _pictures(self, data: bytes, times_s: np.ndarray) -> list[np.ndarray]:
        with _opened(data) as container:
            stream = _first_sound(container)
            packets = [packet for packet in container.demux(stream) if packet.size and packet.pts is not None]
            if not packets:
                raise DecodeError(Reason.NO_SOUND, "the sound stream has no packets")
            start_s = max(_start_s(packets[0], stream), float((stream.start_time or 0) * (stream.time_base or 0)))
            length_s = max(0.0, _end_s(packets[-1], stream) - start_s)
            cut = partial(_window, stream, packets, start_s)
            if length_s <= self.num_steps * HOP / RATE + _SLACK_S:
                wave = _decoded(stream, packets)[0]
                length_s, cut = len(wave) / RATE, partial(_slice, wave)
            num_steps = max(1, (round(length_s * RATE) - WINDOW) // HOP + 1)  # of the whole sound
            if num_steps <= self.num_steps:
                return [levels(self._full(cut(0, round(length_s * RATE))))] * len(times_s)
            return [self._thirds(cut, float(time_s) / length_s, num_steps) for time_s in times_s]

    def _thirds(self, cut: "Cut", place: float, num_steps: int) -> np.ndarray:
        """Return a picture whose colours are the three thirds of a long sound, each at `place`, 0 to 1, inside it."""
        starts = np.array_split(np.arange(num_steps - self.num_steps + 1), 3)
        chosen = [int(third[min(int(place * len(third)), len(third) - 1)]) if len(third) else 0 for third in starts]
        length = (self.num_steps - 1) * HOP + WINDOW
        return np.concatenate([levels(self._full(cut(start * HOP, length)))[..., :1] for start in chosen], axis=-1)

    def _full(self, wave: Tensor) -> Tensor:
        """Return the bands [S, M] of samples as exactly `num_steps` steps: cut, or repeated."""
        mel = log_mel(wave, num_mel=self.num_mel)
        return mel.repeat(-(-self.num_steps // len(mel)), 1)[: self.num_steps]


def levels(mel: Tensor) -> np.ndarray:
    """Return energies [S, M] as a picture uint8 [M, S, 3], three equal colours."""
    grey = ((mel - LOWEST) * (255 / (HIGHEST - LOWEST))).round().clamp(0, 255).to(torch.uint8)
    return rearrange(grey, "s m -> m s 1").expand(-1, -1, 3).numpy()


def log_mel(wave: Tensor, *, num_mel: int) -> Tensor:
    """Return the logarithm of the energy in mel bands [S, M] of samples [N] in -1..1, S = 1 + (N - 400) // 160.

    Each window loses its mean, is emphasised in the high tones and weighted by a Hann window, as Kaldi's filter banks.
    A sound shorter than a window is filled up with silence.
    """
    wave = F.pad(wave, (0, max(0, WINDOW - len(wave))))
    windows = wave.unfold(0, WINDOW, HOP)  # [S, 400]
    windows = windows - windows.mean(1, keepdim=True)
    before = torch.cat([windows[:, :1], windows[:, :-1]], dim=1)
    windows = (windows - _PREEMPHASIS * before) * torch.hann_window(WINDOW, periodic=False)
    size = 1 << (WINDOW - 1).bit_length()
    power = torch.fft.rfft(windows, n=size).abs().square()  # [S, F]
    return (power @ _bands(num_mel, size).T).clamp(min=_SMALLEST).log()


@lru_cache(maxsize=8)
def _bands(num_mel: int, size: int) -> Tensor:
    """Return the weights [M, F] of triangles that are evenly spaced on the mel scale, from 20 Hz to half the rate."""
    low, high = _mel(torch.tensor([_LOWEST_HZ, RATE / 2], dtype=torch.float64))
    edges = low + (high - low) / (num_mel + 1) * torch.arange(num_mel + 2)  # [M + 2]
    at = _mel(torch.arange(size // 2 + 1, dtype=torch.float64) * (RATE / size))[None]  # [1, F]
    left, centre, right = (edges[start : start + num_mel, None] for start in range(3))
    weights = torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp(min=0)
    weights[:, -1] = 0  # Kaldi leaves out the highest frequency
    return weights.float()


def _mel(hertz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(hertz / 700.0)


Cut = Callable[[int, int], Tensor]  # first sample, number of samples -> [N]


def _slice(wave: Tensor, start: int, count: int) -> Tensor:
    return wave[start : start + count]


def _window(stream: AudioStream, packets: list[Packet], first_s: float, start: int, count: int) -> Tensor:
    """Return samples of a sound that begins at `first_s`, decoding only their packets; what is not there is silent."""
    begin = first_s + start / RATE
    end = begin + count / RATE
    wanted = [p for p in packets if _end_s(p, stream) > begin - _LEAD_S and _start_s(p, stream) < end]
    wave, wave_s = _decoded(stream, wanted)
    offset = round((begin - wave_s) * RATE)
    found = wave[max(0, offset) : max(0, offset + count)]
    return F.pad(found, (min(max(0, -offset), count), count))[:count]


def _decoded(stream: AudioStream, packets: list[Packet]) -> tuple[Tensor, float]:
    """Return the samples [N] of packets and when the first of them is heard. Raises DecodeError if there is none."""
    stream.codec_context.flush_buffers()
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
    first_s, parts = None, []
    try:
        for frame in _frames(stream, packets):
            first_s = frame.time if first_s is None else first_s
            parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
        parts += [out.to_ndarray()[0] for out in resampler.resample(None)] if parts else []
    except ValueError as error:  # the kind of samples changes on the way
        raise DecodeError(Reason.NO_SOUND, str(error)) from error
    if first_s is None or not sum(map(len, parts)):
        raise DecodeError(Reason.NO_SOUND, f"no sample can be decoded from {len(packets)} packets")
    return torch.nan_to_num(torch.from_numpy(np.concatenate(parts))), first_s


def _frames(stream: AudioStream, packets: list[Packet]) -> Iterator[av.AudioFrame]:
    for packet in [*packets, None]:
        try:
            yield from stream.codec_context.decode(packet)  # type: ignore[misc]
        except FFmpegError:
            continue  # costs the samples of a damaged packet


def _opened(data: bytes) -> InputContainer:
    return open_container(data, kind_of(data), decode_to_probe=False, max_pixels=LIMITS.max_pixels)


def _first_sound(container: InputContainer) -> AudioStream:
    """Return the first sound stream, and tell the demuxer to skip all others."""
    sounds = list(container.streams.audio)
    if not sounds:
        raise DecodeError(Reason.NO_SOUND, "there is no sound stream")
    for other in container.streams:
        if other.index != sounds[0].index:
            other.discard = Discard.all
    codec = sounds[0].codec_context.codec.canonical_name if sounds[0].codec_context else None
    if codec not in CODECS:
        raise DecodeError(Reason.NO_SOUND, f"{codec or 'an unknown codec'} is none of {', '.join(sorted(CODECS))}")
    return sounds[0]


def _start_s(packet: Packet, stream: AudioStream) -> float:
    assert packet.pts is not None and stream.time_base is not None
    return float(packet.pts * stream.time_base)


def _end_s(packet: Packet, stream: AudioStream) -> float:
    assert stream.time_base is not None
    return _start_s(packet, stream) + float((packet.duration or 0) * stream.time_base)
