"""Pools, grids as sequences, positions. Axes: B batch, T frames, H W cells, N tokens, D width."""

import pytest
import torch

from vlp.layers.grid import grid_tokens, tokens_grid
from vlp.layers.pool import AttentionPool, ClsPool, LastPool, MeanPool, UnitFramePool
from vlp.layers.position import LearnedPositions, SpacePositions, resize_space, resize_time, sine_table
from vlp.types import Grid, Tokens

B, T, H, W, D, N = 2, 3, 4, 5, 6, 7
FRAMES = torch.tensor([[True, True, False], [True, False, False]])
WORDS = torch.arange(N) < torch.tensor([[4], [6]])


def grid(num_prefix: int = 0, hole: float | None = None) -> Grid:
    torch.manual_seed(0)
    x, prefix = torch.randn(B, T, H, W, D), torch.randn(B, num_prefix, D)
    if hole is not None:
        x = x.masked_fill(~FRAMES[:, :, None, None, None], hole)
        prefix = prefix.masked_fill(~FRAMES[..., None], hole) if num_prefix == T else prefix
    return Grid(x, FRAMES, prefix)


def words(hole: float | None = None) -> Tokens:
    torch.manual_seed(0)
    x = torch.randn(B, N, D)
    return Tokens(x if hole is None else x.masked_fill(~WORDS[..., None], hole), WORDS)


@pytest.mark.parametrize("num_prefix", [0, 1, T])
@pytest.mark.parametrize("pool", [MeanPool(dim=D), ClsPool(dim=D), AttentionPool(dim=D, num_heads=2)])
def test_pool_of_a_video_ignores_masked_frames(pool, num_prefix):
    if isinstance(pool, ClsPool) and num_prefix == 0:
        return
    assert pool(grid(num_prefix)).shape == (B, D)
    torch.testing.assert_close(pool(grid(num_prefix)), pool(grid(num_prefix, hole=9.0)))


@pytest.mark.parametrize("pool", [MeanPool(dim=D), LastPool(dim=D), AttentionPool(dim=D, num_heads=2)])
def test_pool_of_a_text_ignores_padding(pool):
    assert pool(words()).shape == (B, D)
    torch.testing.assert_close(pool(words()), pool(words(hole=9.0)))


def test_mean_pool_equals_the_mean_of_real_cells():
    x = grid().x
    torch.testing.assert_close(MeanPool(dim=D)(grid())[0], x[0, :2].flatten(0, 2).mean(0))
    torch.testing.assert_close(MeanPool(dim=D)(grid())[1], x[1, :1].flatten(0, 2).mean(0))
    torch.testing.assert_close(MeanPool(dim=D)(words())[1], words().x[1, :6].mean(0))


def test_cls_pool_averages_class_tokens_of_real_frames():
    prefix = grid(T).prefix
    torch.testing.assert_close(ClsPool(dim=D)(grid(T))[0], prefix[0, :2].mean(0))
    assert torch.equal(ClsPool(dim=D)(grid(1)), grid(1).prefix[:, 0])
    assert torch.equal(ClsPool(dim=D)(words()), words().x[:, 0])


def test_unit_frame_pool_averages_directions_of_real_frames():
    prefix = grid(T).prefix
    expected = (prefix[0, 0] / prefix[0, 0].norm() + prefix[0, 1] / prefix[0, 1].norm()) / 2
    torch.testing.assert_close(UnitFramePool(dim=D)(grid(T))[0], expected)
    torch.testing.assert_close(UnitFramePool(dim=D)(grid(T, hole=9.0)), UnitFramePool(dim=D)(grid(T)))


def test_last_pool_takes_the_last_real_token():
    assert torch.equal(LastPool(dim=D)(words()), words().x[[0, 1], [3, 5]])


def test_cls_pool_without_class_token_names_the_fix():
    with pytest.raises(ValueError, match="MeanPool"):
        ClsPool(dim=D)(grid())


@pytest.mark.parametrize("pool", [MeanPool(dim=D), ClsPool(dim=D), LastPool(dim=D), AttentionPool(dim=D, num_heads=2)])
def test_pool_of_nothing_real_is_finite(pool):
    empty = Tokens(words().x, torch.zeros_like(WORDS))
    assert pool(empty).isfinite().all()


def test_mean_pool_of_a_video_without_real_frames_is_zero():
    x, mask, prefix = grid(1)
    assert MeanPool(dim=D)(Grid(x, torch.zeros_like(mask), prefix)).abs().max() == 0


def test_every_parameter_of_attention_pool_gets_a_gradient():
    pool = AttentionPool(dim=D, num_heads=2)
    pool(grid(1)).square().sum().backward()
    assert all(p.grad is not None for p in pool.parameters())


@pytest.mark.parametrize("num_prefix", [0, 1, T])
def test_grid_survives_the_way_to_tokens_and_back(num_prefix):
    before = grid(num_prefix)
    tokens = grid_tokens(before)
    after = tokens_grid(tokens.x, before)
    assert torch.equal(after.x, before.x) and torch.equal(after.prefix, before.prefix)
    assert tokens.mask.sum(1).tolist() == [2 * H * W + min(num_prefix, 2), H * W + min(num_prefix, 1)]


def test_class_token_of_a_video_without_real_frames_is_masked():
    x, mask, prefix = grid(1)
    assert grid_tokens(Grid(x, mask & torch.tensor([[True], [False]]), prefix)).mask[:, 0].tolist() == [True, False]


def test_learned_positions_add_the_first_rows():
    torch.manual_seed(0)
    positions, x = LearnedPositions(length=4, dim=D), torch.randn(B, T, H, W, D)
    expected = torch.stack([x[:, t] + positions.table[t] for t in range(T)], dim=1)
    torch.testing.assert_close(positions(x), expected)
    torch.testing.assert_close(positions(x[:, :, 0, 0]), expected[:, :, 0, 0])


def test_learned_positions_refuse_longer_inputs():
    with pytest.raises(ValueError, match=r"3 places.*has 2"):
        LearnedPositions(length=2, dim=D)(torch.randn(B, T, D))


def test_space_positions_fit_another_grid_by_interpolation():
    positions = SpacePositions(height=H, width=W, dim=D)
    torch.nn.init.constant_(positions.table, 0.5)
    torch.testing.assert_close(positions(torch.zeros(B, T, 7, 3, D)), torch.full((B, T, 7, 3, D), 0.5))


def test_resize_time_is_linear_and_keeps_the_ends():
    table = torch.tensor([[0.0], [2.0], [8.0]])
    assert resize_time(table, 5).flatten().tolist() == [0.0, 1.0, 2.0, 5.0, 8.0]
    assert resize_time(table, 3) is table


def test_resize_space_keeps_a_ramp_a_ramp():
    ramp = torch.arange(6.0)[:, None, None].expand(6, 5, 1)
    small = resize_space(ramp, 3, 5)
    assert small.shape == (3, 5, 1) and resize_space(ramp, 6, 5) is ramp
    torch.testing.assert_close(small[1, :, 0], torch.full((5,), 2.5))


def test_sine_table_tells_places_apart():
    table = sine_table(11, 8)
    assert table.shape == (11, 8) and table[0].tolist() == [0.0] * 4 + [1.0] * 4
    assert torch.pdist(table).min() > 0.1
    with pytest.raises(ValueError, match="dim=7"):
        sine_table(3, 7)
