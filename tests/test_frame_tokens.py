"""Places and class tokens for an encoder that has neither."""

import torch

from vlp.connectors.frame_tokens import FrameTokens
from vlp.types import Grid


def test_each_frame_gets_a_class_token_that_knows_its_time_only():
    torch.manual_seed(0)
    stage = FrameTokens(in_dim=6, dim=6, num_frames=4, size=24, patch_size=8)
    grid = Grid(torch.randn(2, 3, 3, 3, 6), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 0, 6))
    out = stage(grid)
    assert out.x.shape == grid.x.shape and out.prefix.shape == (2, 3, 6)
    torch.testing.assert_close(out.prefix[0], out.prefix[1])
    expected = stage.norm(stage.class_token.table + stage.times.table[:3])
    torch.testing.assert_close(out.prefix[0], expected)


def test_cells_know_their_place_and_time():
    stage = FrameTokens(in_dim=6, dim=6, num_frames=4, size=24, patch_size=8)
    grid = Grid(torch.zeros(1, 3, 3, 3, 6), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 0, 6))
    cells = stage(grid).x[0].flatten(0, 2)
    assert len(cells.unique(dim=0)) == 27
