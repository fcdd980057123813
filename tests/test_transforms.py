"""Augmentations against few-line references; a clip of equal frames must stay one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlp.data.transforms import CenterCrop, ColorJitter, HorizontalFlip, PadToSquare, RandomResizedCrop, resize

STRONG = ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3)
ALL = [RandomResizedCrop(size=5), CenterCrop(size=5), PadToSquare(size=5), HorizontalFlip(prob=0.5), STRONG]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (*shape, 3), dtype=np.uint8)


def resized_in_double(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    video = torch.from_numpy(np.ascontiguousarray(frames)).double().movedim(-1, 1)
    out = torch.nn.functional.interpolate(video, (height, width), mode="bilinear", antialias=True)
    return out.movedim(1, -1).numpy()


@pytest.mark.parametrize("transform", ALL, ids=lambda transform: type(transform).__name__)
def test_all_frames_of_a_clip_get_the_same(transform):
    frames = np.repeat(noise(1, 9, 13), 3, axis=0)
    for seed in range(5):
        out = transform(frames, np.random.default_rng(seed))
        assert out.dtype == np.uint8 and out.shape[0] == 3 and out.shape[3] == 3 and out.flags.c_contiguous
        np.testing.assert_array_equal(out, np.repeat(out[:1], 3, axis=0))
        np.testing.assert_array_equal(out, transform(frames, np.random.default_rng(seed)))


@pytest.mark.parametrize("transform", ALL, ids=lambda transform: type(transform).__name__)
def test_input_is_left_as_it_is(transform):
    frames = noise(2, 9, 13)
    before = frames.copy()
    for seed in range(3):
        transform(frames, np.random.default_rng(seed))
    np.testing.assert_array_equal(frames, before)


@pytest.mark.parametrize("size", [(5, 7), (24, 31), (11, 13)])
def test_resize_equals_antialiased_bilinear_in_double_precision(size):
    frames = noise(3, 11, 13)
    np.testing.assert_allclose(resize(frames, *size), resized_in_double(frames, *size), atol=1.0)


def test_resize_averages_what_a_pixel_covers():
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.abs(resize(stripes, 4, 4).astype(int) - 128).max() <= 20  # without antialias: 0 or 255


def test_resize_takes_views_that_run_backwards():
    frames = noise(2, 9, 13)
    np.testing.assert_array_equal(resize(frames[:, ::-1, ::-1], 4, 5), resize(frames[:, ::-1, ::-1].copy(), 4, 5))


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 99))
def test_box_lies_inside_the_frame(height, width, seed):
    crop = RandomResizedCrop(size=4, scale_min=0.1)
    top, left, h, w = crop.box(height, width, np.random.default_rng(seed))
    assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


def test_box_of_a_single_pixel_is_that_pixel():
    crop = RandomResizedCrop(size=4, scale_min=0.01, scale_max=0.3)
    assert {crop.box(1, 1, np.random.default_rng(seed)) for seed in range(50)} == {(0, 0, 1, 1)}


def test_box_has_the_area_and_the_ratio_asked_for():
    crop, rng = (
        RandomResizedCrop(size=4, scale_min=0.2, scale_max=0.4, ratio_min=0.5, ratio_max=2),
        np.random.default_rng(0),
    )
    boxes = np.array([crop.box(1000, 1400, rng) for _ in range(600)])
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1.4e6, boxes[:, 3] / boxes[:, 2]
    assert 0.199 < area.min() < 0.21 and 0.39 < area.max() < 0.401 and abs(area.mean() - 0.3) < 0.01
    assert 0.499 < ratio.min() < 0.51 and 1.95 < ratio.max() < 2.01 and abs(np.log(ratio).mean()) < 0.05
    assert boxes[:, 0].min() < 40 and (boxes[:, 0] + boxes[:, 2]).max() > 960


@pytest.mark.parametrize(("height", "width", "box"), [(10, 400, (0, 193, 10, 13)), (400, 9, (194, 0, 12, 9))])
def test_box_of_a_very_long_frame_is_the_largest_in_its_middle(height, width, box):
    assert RandomResizedCrop(size=4, scale_min=0.9).box(height, width, np.random.default_rng(0)) == box


def test_random_crop_is_the_resized_box():
    frames, crop = noise(3, 20, 30), RandomResizedCrop(size=7)
    top, left, h, w = crop.box(20, 30, np.random.default_rng(5))
    expected = resized_in_double(frames[:, top : top + h, left : left + w], 7, 7)
    np.testing.assert_allclose(crop(frames, np.random.default_rng(5)), expected, atol=1.0)


@pytest.mark.parametrize("shape", [(8, 14), (14, 8), (8, 8)])
def test_center_crop_is_the_middle_square(shape):
    frames = noise(2, *shape)
    middle = frames[:, (shape[0] - 8) // 2 :, (shape[1] - 8) // 2 :][:, :8, :8]
    np.testing.assert_array_equal(CenterCrop(size=8)(frames, None), middle)
    np.testing.assert_allclose(CenterCrop(size=3)(frames, None), resized_in_double(middle, 3, 3), atol=1.0)


def test_pad_to_square_keeps_everything_and_pads_evenly_with_black():
    frames = np.full((2, 6, 12, 3), 200, np.uint8)
    square = PadToSquare(size=8)(frames, None)
    assert square.shape == (2, 8, 8, 3) and (square[:, 2:6] == 200).all()
    assert not square[:, :2].any() and not square[:, 6:].any()
    assert PadToSquare(size=8)(noise(1, 300, 1), None).shape == (1, 8, 8, 3)


def test_flip_mirrors_with_its_probability():
    frames = noise(2, 5, 7)
    np.testing.assert_array_equal(HorizontalFlip(prob=1)(frames, np.random.default_rng(0)), frames[:, :, ::-1])
    np.testing.assert_array_equal(HorizontalFlip(prob=0)(frames, np.random.default_rng(0)), frames)
    rng = np.random.default_rng(0)
    flipped = [not np.array_equal(HorizontalFlip(prob=0.2)(frames, rng), frames) for _ in range(500)]
    assert 0.15 < np.mean(flipped) < 0.25


class Fixed:
    """A generator whose draws of the jitter are known."""

    def __init__(self, *draws: float) -> None:
        self.draws = np.array(draws)

    def uniform(self, low, high, size):
        return self.draws


def test_jitter_without_strength_changes_nothing():
    frames = noise(2, 5, 7)
    np.testing.assert_array_equal(ColorJitter()(frames, np.random.default_rng(0)), frames)


def test_brightness_multiplies_and_is_clipped():
    frames = np.array([[[[100, 200, 8]]]], np.uint8)
    assert ColorJitter(brightness=0.5)(frames, Fixed(1, 0, 0, 0)).ravel().tolist() == [150, 255, 12]
    assert ColorJitter(brightness=0.5)(frames, Fixed(-1, 0, 0, 0)).ravel().tolist() == [50, 100, 4]


def test_contrast_pulls_towards_the_mean_grey_of_the_whole_clip():
    frames = np.stack([np.full((2, 3, 3), 40, np.uint8), np.full((2, 3, 3), 140, np.uint8)])
    out = ColorJitter(contrast=0.5)(frames, Fixed(0, -1, 0, 0))
    assert np.unique(out[0]).tolist() == [65] and np.unique(out[1]).tolist() == [115]  # around 90


def test_contrast_pulls_towards_the_grey_that_brightness_has_left():
    frames = np.stack([np.full((2, 3, 3), 40, np.uint8), np.full((2, 3, 3), 140, np.uint8)])
    out = ColorJitter(brightness=0.5, contrast=0.5)(frames, Fixed(1, -1, 0, 0))
    np.testing.assert_allclose(out[:, 0, 0, 0], [97.5, 172.5], atol=0.51)  # 60 and 210 around 135


def test_saturation_blends_with_grey():
    frames = np.array([[[[200, 100, 50]]]], np.uint8)
    grey = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    out = ColorJitter(saturation=1)(frames, Fixed(0, 0, -0.5, 0))
    np.testing.assert_allclose(out.ravel(), [(200 + grey) / 2, (100 + grey) / 2, (50 + grey) / 2], atol=0.51)
    assert np.ptp(ColorJitter(saturation=1)(frames, Fixed(0, 0, -1, 0))) == 0


def test_hue_turns_colors_but_keeps_grey_and_luma():
    frames = np.array([[[[120, 90, 80], [77, 77, 77]]]], np.uint8)
    out = ColorJitter(hue=0.5)(frames, Fixed(0, 0, 0, 0.5)).reshape(2, 3).astype(float)
    assert out[1].tolist() == [77, 77, 77]
    assert abs((out[0] - frames[0, 0, 0]) @ [0.299, 0.587, 0.114]) < 1.0
    chroma = [np.array(c, float) - np.dot(c, [0.299, 0.587, 0.114]) for c in (frames[0, 0, 0], out[0])]
    assert np.dot(*chroma) / math.prod(map(np.linalg.norm, chroma)) < 0.2  # a quarter turn


def test_factors_are_drawn_over_their_ranges():
    frames = np.full((1, 1, 1, 3), 100, np.uint8)
    values = [int(ColorJitter(brightness=0.4)(frames, np.random.default_rng(seed))[0, 0, 0, 0]) for seed in range(300)]
    assert min(values) in (60, 61) and max(values) in (139, 140) and 95 < np.mean(values) < 105


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(size=0), "size=0"),
        (lambda: RandomResizedCrop(size=8, scale_min=0.9, scale_max=0.5), "scale_min=0.9"),
        (lambda: RandomResizedCrop(size=8, scale_max=1.5), "scale_max=1.5"),
        (lambda: RandomResizedCrop(size=8, ratio_min=0), "ratio_min=0"),
        (lambda: CenterCrop(size=-1), "size=-1"),
        (lambda: PadToSquare(size=0), "size=0"),
        (lambda: HorizontalFlip(prob=1.5), "prob=1.5"),
        (lambda: ColorJitter(hue=0.6), "hue=0.6"),
        (lambda: ColorJitter(brightness=-0.1), "brightness=-0.1"),
    ],
)
def test_senseless_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
