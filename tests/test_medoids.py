"""Key frames by K-medoids. Axes: B clips, N frames, E embedding."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fixed_weights import wave

from vlp.layers.medoids import KeyFramePool, k_medoids
from vlp.types import Grid

ALL = torch.ones(1, 9, dtype=torch.bool)


def pooled(x: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    return KeyFramePool(dim=x.shape[2], **options)(Grid(x.new_zeros(*x.shape[:2], 1, 1, x.shape[2]), mask, x))


def test_choices_are_those_of_the_published_function():
    """The places are from batch_fast_kmedoids of gengyuanmax/MeVTR on the same numbers (docs/systems.md)."""
    places, there = k_medoids(wave((3, 12, 5)), torch.ones(3, 12, dtype=torch.bool), 4)
    assert places.tolist() == [[1, 3, 7, 9], [2, 6, 7, 11], [0, 2, 4, 7]] and there.all()


def test_well_separated_groups_give_the_centre_of_each():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    offsets = torch.tensor([[0.0, 0.0], [0.5, 0.1], [-0.5, 0.2]])
    x = (centres[:, None] + offsets).reshape(1, 9, 2)
    places, _ = k_medoids(x, ALL, 3)
    assert places.tolist() == [[0, 3, 6]]


def test_no_single_move_of_a_medoid_inside_its_cluster_is_better():
    torch.manual_seed(0)
    x = torch.randn(1, 9, 3)
    distance = torch.cdist(x[0], x[0])
    places = k_medoids(x, ALL, 3)[0][0]
    own = distance[places].argmin(0)
    for number, medoid in enumerate(places.tolist()):
        members = (own == number).nonzero()[:, 0].tolist()
        costs = {m: sum(float(distance[m, n]) for n in members) for m in members}
        assert costs[medoid] == pytest.approx(min(costs.values()))


def test_padding_takes_no_part_and_missing_medoids_are_named():
    torch.manual_seed(1)
    x = torch.randn(2, 6, 3)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    places, there = k_medoids(x, mask, 3)
    other, _ = k_medoids(x.masked_fill(~mask[..., None], 50.0), mask, 3)
    assert torch.equal(places[there], other[there]) and there.sum(1).tolist() == [3, 2]
    assert places[1, :2].tolist() == [0, 1] and (places[0] < 4).all()


def test_pool_is_the_mean_of_unit_vectors_of_the_key_frames():
    torch.manual_seed(3)
    x = torch.randn(1, 9, 3, requires_grad=True)
    places = k_medoids(x, ALL, 4)[0][0]
    mean = pooled(x, ALL, num_key_frames=4)
    torch.testing.assert_close(mean, F.normalize(x[:, places], dim=-1).mean(1))
    mean.square().sum().backward()
    assert set(x.grad[0].any(1).nonzero()[:, 0].tolist()) == set(places.tolist())
    largest = pooled(x, ALL, num_key_frames=4, largest=True)
    torch.testing.assert_close(largest, F.normalize(x[:, places], dim=-1).amax(1))


@pytest.mark.parametrize(("num_real", "largest"), itertools.product([1, 3], [False, True]))
def test_fewer_real_frames_than_key_frames_are_all_taken(num_real, largest):
    torch.manual_seed(4)
    x, mask = torch.randn(1, 9, 3), torch.arange(9)[None] < num_real
    real = F.normalize(x[:, :num_real], dim=-1)
    expected = real.amax(1) if largest else real.mean(1)
    torch.testing.assert_close(pooled(x, mask, num_key_frames=5, largest=largest), expected)


def test_no_key_frame_is_refused():
    with pytest.raises(ValueError, match="num_key_frames=0 must be at least 1"):
        KeyFramePool(dim=3, num_key_frames=0)
