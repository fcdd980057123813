"""Numbers of hidden cells: the objective and its targets."""

import pytest
import torch
from torch import nn

from vlp.encoders.targets import CellPixels, ImageFeatures, OrientedGradients
from vlp.objectives.masked_regression import MaskedRegression
from vlp.types import Grid

FRAME_MASK = torch.ones(2, 3, dtype=torch.bool)
VALID = torch.tensor([True, False])
HIDDEN = torch.zeros(2, 3, 2, 4, dtype=torch.bool)
HIDDEN[0, 0, 1, 2], HIDDEN[0, 2, 0], HIDDEN[1] = True, True, True


def frames() -> torch.Tensor:
    return torch.randint(256, (2, 3, 16, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_value_is_the_mean_distance_of_each_hidden_cell_of_real_clips():
    torch.manual_seed(0)
    objective, video = MaskedRegression(dim=5, target=CellPixels(patch_size=8, side=2)), frames()
    x = torch.randn(2, 3, 2, 4, 5, requires_grad=True)
    result = objective(Grid(x, FRAME_MASK, x[:, 0, 0, :0]), HIDDEN, video, FRAME_MASK, VALID)
    target = objective.target(video, FRAME_MASK)
    by_hand = sum(
        (objective.head(x[0, t, h, w]) - target[0, t, h, w]).abs().mean() for _, t, h, w in HIDDEN[:1].nonzero()
    )
    torch.testing.assert_close(result.total, by_hand)
    result.total.backward()
    assert int(result.count) == 5 and not x.grad[~HIDDEN].any() and not x.grad[1].any()


def test_target_stays_frozen_and_in_evaluation_mode():
    target = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    target.dim = 3
    objective = MaskedRegression(dim=5, target=target).train()
    assert not target.training and objective.head.training and not any(p.requires_grad for p in target.parameters())


def test_pixels_of_a_cell_are_its_averages():
    video = frames()
    cells = CellPixels(patch_size=8, side=2)(video, FRAME_MASK)
    assert cells.shape == (2, 3, 2, 4, 12)
    expected = video[1, 2, 8:12, 20:24, 1].float().mean() / 255  # cell (1, 2), colour 1, row 0, column 1 of 2 x 2
    torch.testing.assert_close(cells[1, 2, 1, 2, 5], expected)


@pytest.mark.parametrize(("horizontal", "orientation"), [(True, 0), (False, 4)])
def test_edges_vote_for_their_direction(horizontal, orientation):
    ramp = torch.arange(16, dtype=torch.uint8) * 4
    image = ramp.expand(16, 16) if horizontal else ramp[:, None].expand(16, 16)
    video = image[None, None, :, :, None].expand(1, 1, 16, 16, 3)
    cells = OrientedGradients(patch_size=8, cell=4)(video, FRAME_MASK[:1, :1])
    assert cells.shape == (1, 1, 2, 2, 3 * 9 * 4)
    votes = cells[0, 0, 0, 0].view(3, 9, 4)
    assert votes.sum((0, 2)).argmax() == orientation
    torch.testing.assert_close(cells.norm(dim=-1), torch.ones(1, 1, 2, 2))


def test_image_features_are_those_of_the_frozen_model_frame_by_frame():
    target = ImageFeatures(name="resnet10t", size=64)
    video = torch.randint(256, (1, 2, 64, 64, 3), dtype=torch.uint8)
    cells = target(video, FRAME_MASK[:1, :2])
    assert cells.shape == (1, 2, 2, 2, target.dim) and not cells.requires_grad
    torch.testing.assert_close(cells[:, 1:], target(video[:, 1:], FRAME_MASK[:1, 1:2]), atol=1e-4, rtol=1e-4)


def test_grids_that_differ_are_refused_and_cells_must_divide():
    objective = MaskedRegression(dim=5, target=CellPixels(patch_size=16, side=2))
    x = torch.randn(2, 3, 2, 4, 5)
    with pytest.raises(ValueError, match=r"grid of \(3, 1, 2\), the encoder one of \(3, 2, 4\)"):
        objective(Grid(x, FRAME_MASK, x[:, 0, 0, :0]), HIDDEN, frames(), FRAME_MASK, VALID)
    with pytest.raises(ValueError, match="side=3 does not divide patch_size=8"):
        CellPixels(patch_size=8, side=3)
    with pytest.raises(ValueError, match="cell=5 does not divide patch_size=8"):
        OrientedGradients(patch_size=8, cell=5)
