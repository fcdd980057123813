"""Properties of the times chosen, over random videos."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlp.data.sampling import Dense, Fps, Segments

durations = st.floats(0.01, 30_000)
rates = st.floats(0.5, 240)
counts = st.integers(1, 64)
seeds = st.one_of(st.none(), st.integers(0, 99))


def generator(seed):
    return None if seed is None else np.random.default_rng(seed)


samplings = st.one_of(
    st.builds(Segments, num_frames=counts),
    st.builds(Fps, num_frames=counts, fps=st.floats(0.1, 60)),
    st.builds(Dense, num_frames=counts, window_s=st.floats(0.01, 60)),
)


@given(samplings, durations, rates, seeds)
def test_times_are_sorted_and_each_has_a_frame(sampling, duration_s, fps, seed):
    times_s = sampling(duration_s, fps, generator(seed))
    assert times_s.dtype == np.float64 and 1 <= len(times_s) <= sampling.num_frames
    assert (np.diff(times_s) >= 0).all() and times_s[0] >= 0
    assert times_s[-1] < duration_s and times_s[-1] <= max(0, duration_s - 0.5 / fps)


@given(samplings, durations, rates, st.integers(0, 99))
def test_same_generator_gives_the_same_times_and_another_one_others(sampling, duration_s, fps, seed):
    times_s = sampling(duration_s, fps, generator(seed))
    np.testing.assert_array_equal(times_s, sampling(duration_s, fps, generator(seed)))


@given(st.integers(1, 40), st.integers(1, 9), st.floats(1, 120), st.integers(0, 99))
def test_each_segment_holds_its_time(num_frames, frames_each, fps, seed):
    duration_s = num_frames * frames_each / fps
    times_s = Segments(num_frames=num_frames)(duration_s, fps, generator(seed))
    edges_s = np.arange(num_frames + 1) * frames_each / fps
    assert (times_s >= edges_s[:-1] * (1 - 1e-12)).all() and (times_s <= edges_s[1:] * (1 + 1e-12)).all()


@given(counts, st.floats(1, 500), st.sampled_from([25.0, 30.0]))
def test_middles_of_segments_equal_the_hand_formula(num_frames, duration_s, fps):
    by_hand = [min((i + 0.5) * duration_s / num_frames, duration_s - 0.5 / fps) for i in range(num_frames)]
    np.testing.assert_allclose(Segments(num_frames=num_frames)(duration_s, fps, None), by_hand, rtol=1e-12)


def test_random_times_fill_their_segments():
    rng = np.random.default_rng(0)
    inside = np.stack([Segments(num_frames=4)(8.0, 30, rng) for _ in range(400)]) / 2 - np.arange(4)  # in [0, 1)
    assert inside.min() < 0.02 and inside.max() > 0.97 and abs(inside.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(inside[:, 0], inside[:, 1])[0, 1]) < 0.15  # drawn one by one


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [
        (2.0, [0.25, 0.75, 1.25, 1.75]),
        (1.8, [0.4, 0.9, 1.4]),  # three frames at 2 a second, in the middle
        (0.3, [0.15]),
        (12.0, [1.5, 4.5, 7.5, 10.5]),  # more than four: covered evenly
    ],
)
def test_fps_keeps_its_rate_until_the_cap(duration_s, expected):
    np.testing.assert_allclose(Fps(num_frames=4, fps=2)(duration_s, 30, None), expected)


@given(st.floats(0.5, 100), st.integers(0, 99))
def test_fps_spaces_times_evenly_at_any_phase(duration_s, seed):
    times_s = Fps(num_frames=1000, fps=2)(duration_s, 1000, generator(seed))
    assert len(times_s) == max(1, int(duration_s * 2 + 1e-6))
    np.testing.assert_allclose(np.diff(times_s)[:-1], 0.5, atol=1e-9)  # the last may be moved to the last frame


def test_fps_counts_a_frame_that_rounding_hides():
    assert len(Fps(num_frames=99, fps=30)(0.1 + 0.2, 30, None)) == len(Fps(num_frames=99, fps=30)(0.3, 30, None)) == 9
    assert len(Fps(num_frames=99, fps=10)(0.7 - 1e-12, 30, None)) == 7


def test_dense_window_is_centred_or_anywhere_and_evenly_spaced():
    dense = Dense(num_frames=4, window_s=2.0)
    np.testing.assert_allclose(dense(10.0, 30, None), [4.25, 4.75, 5.25, 5.75])
    starts_s = [dense(10.0, 30, np.random.default_rng(seed))[0] - 0.25 for seed in range(300)]
    assert min(starts_s) >= 0 and max(starts_s) <= 8 and min(starts_s) < 0.2 and max(starts_s) > 7.8
    np.testing.assert_allclose(np.diff(dense(10.0, 30, np.random.default_rng(1))), 0.5)


def test_dense_takes_a_short_video_whole():
    np.testing.assert_allclose(Dense(num_frames=2, window_s=9)(1.0, 30, np.random.default_rng(0)), [0.25, 0.75])


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_still_image_is_looked_at_at_time_zero(rng):
    assert Segments(num_frames=3)(0.0, 0.0, rng).tolist() == [0, 0, 0]
    assert Dense(num_frames=3, window_s=1)(0.0, 0.0, rng).tolist() == [0, 0, 0]
    assert Fps(num_frames=3, fps=1)(0.0, 0.0, rng).tolist() == [0]


class Highest:
    """A generator that draws the largest number below 1."""

    def random(self, size=None):
        return np.full(size or (), np.nextafter(1, 0))


@given(durations, counts)
def test_unknown_rate_keeps_times_inside_the_video(duration_s, num_frames):
    for sampling in (Segments(num_frames=num_frames), Dense(num_frames=num_frames, window_s=0.5)):
        assert (sampling(duration_s, 0.0, Highest()) < duration_s).all()
    assert Segments(num_frames=1)(4.0, 0.0, None).tolist() == [2]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Segments(num_frames=0), "num_frames=0"),
        (lambda: Fps(num_frames=4, fps=0), "fps=0"),
        (lambda: Fps(num_frames=4, fps=float("nan")), "fps=nan"),
        (lambda: Fps(num_frames=4, fps=float("inf")), "fps=inf"),
        (lambda: Dense(num_frames=-1, window_s=1), "num_frames=-1"),
        (lambda: Dense(num_frames=1, window_s=0), "window_s=0"),
    ],
)
def test_senseless_settings_are_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()
