"""Pictures of distance."""

import io

import numpy as np
import pytest
from clips import clip
from PIL import Image

from vlp.data.decode import decode
from vlp.data.depth import Depth

TIMES = np.array([0.0, 0.3])


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def test_sixteen_bits_in_millimetres_are_levels_up_to_the_furthest():
    values = np.tile(np.array([0, 2000, 6000, 10_000, 60_000], np.uint16), (4, 1))
    frames = Depth()(png(values), TIMES, short_side=None).frames
    assert frames.shape == (2, 4, 5, 3) and frames[1, 2, :, 1].tolist() == [0, 51, 153, 255, 255]
    assert Depth(most=5000)(png(values), TIMES, short_side=None).frames[0, 0, :, 0].tolist() == [0, 102, 255, 255, 255]


def test_the_short_side_is_that_which_is_asked_for():
    smooth = np.linspace(0, 9000, 12 * 20).reshape(12, 20).astype(np.uint16)
    frames = Depth()(png(smooth), TIMES[:1], short_side=6).frames
    assert frames.shape == (1, 6, 10, 3)
    means = smooth.reshape(6, 2, 10, 2).mean((1, 3)) * 255 / 10_000
    assert np.abs(frames[0, 1:-1, 1:-1, 0] - means[1:-1, 1:-1]).max() <= 2


@pytest.mark.parametrize("data", [png(np.arange(20, dtype=np.uint8).reshape(4, 5)), clip(8)])
def test_all_else_is_decoded_as_it_is(data):
    ours, plain = Depth()(data, TIMES, short_side=8).frames, decode(data, TIMES, short_side=8).frames
    assert np.array_equal(ours, plain)


def test_nothing_is_no_distance():
    with pytest.raises(ValueError, match="most=0 must be above 0"):
        Depth(most=0)
