"""What a scene of the embedded world sounds like: each object is a tone.

The colour is its pitch, the shape its timbre, the height in the frame bends the pitch by up to half an octave, the size
is how loud it is, and what is not there is silent. So a caption can be told from the sound alone.

N samples.
"""

import numpy as np

from vlp.data.scene import COLOURS, RADII, SHAPES, Scene, tracks

RATE = 16_000
_LOWEST_HZ, _OCTAVES = 200.0, 3.0  # of the colours
_OVERTONES = ((1,), (1, 2), (1, 3), (1, 2, 3), (1, 4), (1, 3, 5), (1, 2, 4))  # of the shapes
_LOUDEST = 0.2  # of the full scale, one object
_MOMENTS_S = 0.01  # between two moments at which an object is looked at


def soundtrack(scene: Scene) -> np.ndarray:
    """Return float32 [N] in -1..1 at 16,000 samples a second, as long as the scene. The same scene sounds the same."""
    count = round(scene.duration_s * RATE)
    moments = max(2, round(scene.duration_s / _MOMENTS_S))
    at = np.arange(count) / RATE
    known = np.arange(moments) * (scene.duration_s / moments)
    wave = np.zeros(count)
    for thing, track in zip(scene.objects, tracks(scene, moments), strict=True):
        pitch = _LOWEST_HZ * 2 ** (_OCTAVES * list(COLOURS).index(thing.colour) / len(COLOURS))
        turns = np.cumsum(pitch * 2 ** (0.5 - np.interp(at, known, track.y))) / RATE
        loud = np.interp(at, known, track.alpha * track.radius) * (_LOUDEST / max(RADII.values()))
        overtones = _OVERTONES[SHAPES.index(thing.shape)]
        wave += loud * sum(np.sin(2 * np.pi * turns * number) for number in overtones) / len(overtones)
    return wave.astype(np.float32)
