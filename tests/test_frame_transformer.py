"""The transformer over frame vectors. Axes: B clips, T frames, H W cells, C width of the input, D width."""

import torch

from vlp.connectors.frame_transformer import FrameTransformer
from vlp.types import Grid

B, T, C, D = 2, 3, 5, 8
MASK = torch.tensor([[True, True, False], [True, True, True]])


def build() -> FrameTransformer:
    torch.manual_seed(0)
    return FrameTransformer(in_dim=C, dim=D, num_frames=4, size=32, patch_size=16, depth=2, num_heads=2, time_std=0.5)


def grid(seed: int = 1, hole: float = 0.0) -> Grid:
    x = torch.randn(B, T, 2, 2, C, generator=torch.Generator().manual_seed(seed))
    return Grid(x.masked_fill(~MASK[:, :, None, None, None], hole), MASK, x.new_zeros(B, 0, C))


def test_cells_keep_their_places_and_the_prefix_is_one_vector_a_frame():
    out = build()(grid())
    assert out.x.shape == (B, T, 2, 2, D) and out.prefix.shape == (B, T, D) and out.mask is MASK


def test_real_frames_do_not_see_unreal_ones():
    stage = build()
    low, high = stage(grid(hole=0.0)), stage(grid(hole=9.0))
    assert torch.equal(low.prefix[MASK], high.prefix[MASK]) and torch.equal(low.x[MASK], high.x[MASK])


def test_every_frame_and_cell_hears_of_the_others():
    stage, changed = build(), grid()
    changed.x[1, 0, 0, 0] += 1.0
    before, after = stage(grid()), stage(changed)
    assert (before.prefix[1] != after.prefix[1]).any(-1).all() and (before.x[1] != after.x[1]).any(-1).all()
    assert torch.equal(before.x[0], after.x[0])


def test_the_order_of_frames_and_the_place_of_cells_matter():
    stage, same = build(), Grid(*(part.clone() for part in grid()))
    turned = same._replace(x=same.x.flip(1))
    mirrored = same._replace(x=same.x.flip(3))
    clip = stage(same).prefix[1].mean(0)
    for other in (turned, mirrored):
        assert not torch.allclose(clip, stage(other).prefix[1].mean(0), atol=1e-4)


def test_every_parameter_gets_a_gradient():
    stage = build()
    out = stage(grid())
    (out.x.square().sum() + out.prefix.sin().sum()).backward()
    assert [n for n, p in stage.named_parameters() if p.grad is None or not p.grad.any()] == []
