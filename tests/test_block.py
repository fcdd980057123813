"""The transformer block, and blocks found and checkpointed from outside. Axes: B batch, N tokens, D width."""

import copy

import pytest
import torch
from torch import nn

from vlp.layers.block import Block, DropPath, blocks_of, checkpoint_blocks, drop_path_rates, match_width

B, N, D, M, D_CONTEXT = 2, 5, 12, 7, 10


def stack(depth: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(Block(dim=D, num_heads=3, **options) for _ in range(depth))
    return model


def test_block_equals_its_formula():
    block, x = stack(1).blocks[0].eval(), torch.randn(B, N, D)
    y = x + block.attn(nn.functional.layer_norm(x, (D,)))
    hidden = nn.functional.gelu(nn.functional.layer_norm(y, (D,)) @ block.mlp.fc1.weight.T)
    torch.testing.assert_close(block(x), y + hidden @ block.mlp.fc2.weight.T)


def test_block_with_context_ignores_masked_context():
    block, x, context = stack(1, cross_dim=D_CONTEXT).blocks[0], torch.randn(B, N, D), torch.randn(B, M, D_CONTEXT)
    mask = torch.arange(M) < torch.tensor([[4], [6]])
    other = torch.where(mask[..., None], context, -3.0)
    torch.testing.assert_close(block(x, None, context, mask), block(x, None, other, mask))
    assert not torch.allclose(block(x, None, context, mask), block(x, None, context))


def test_causal_block_does_not_look_ahead():
    block, x = stack(1, causal=True).blocks[0], torch.randn(B, N, D)
    changed = torch.cat([x[:, :3], torch.randn(B, N - 3, D)], dim=1)
    torch.testing.assert_close(block(x)[:, :3], block(changed)[:, :3])


def test_every_parameter_of_a_block_gets_a_gradient():
    block = stack(1, cross_dim=D_CONTEXT, dropout=0.1).blocks[0]
    block(torch.randn(B, N, D), None, torch.randn(B, M, D_CONTEXT)).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_drop_path_keeps_the_expectation_and_drops_whole_samples():
    torch.manual_seed(0)
    out = DropPath(prob=0.25)(torch.ones(4000, 2, 3))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(out.amax((1, 2)), out.amin((1, 2)))
    assert abs(out.mean() - 1) < 0.03


def test_drop_path_rates_are_linear_in_depth():
    assert drop_path_rates(0.2, 3) == pytest.approx([0.0, 0.1, 0.2])
    assert drop_path_rates(0.2, 1) == [0.0]


def test_match_width_is_nothing_where_widths_are_equal():
    assert not list(match_width(5, 5).parameters())
    assert match_width(5, 7)(torch.randn(2, 5)).shape == (2, 7)


def test_checkpointing_keeps_outputs_gradients_and_names():
    model, x = stack(), torch.randn(B, N, D)
    twin = copy.deepcopy(model)
    assert checkpoint_blocks(twin) == 3
    for part in (model, twin):
        y = x
        for block in part.blocks:
            y = block(y)
        y.square().sum().backward()
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def saved_numbers(model: nn.Module) -> int:
    """Numbers that autograd keeps for the backward pass of two blocks."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        model.blocks[1](model.blocks[0](torch.randn(B, N, D, requires_grad=True)))
    return sum(sizes)


def test_checkpointing_saves_no_activations_inside_blocks():
    plain, thin = stack(), stack()
    checkpoint_blocks(thin)
    assert saved_numbers(thin) < saved_numbers(plain) / 5


def test_a_copy_of_a_checkpointed_model_uses_its_own_parameters():
    model = stack(1)
    checkpoint_blocks(model)
    twin, x = copy.deepcopy(model), torch.randn(B, N, D)
    nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    assert not torch.allclose(model.blocks[0](x), twin.blocks[0](x))


def test_blocks_of_finds_the_layers_of_nested_lists():
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    model = nn.Module()
    model.layers = nn.ModuleList([Stage(), Stage()])
    model.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    assert blocks_of(model) == [*model.layers[0].blocks, *model.layers[1].blocks]


def test_blocks_compile_one_by_one():
    model, x = stack(2), torch.randn(B, N, D)
    expected = model.blocks[1](model.blocks[0](x))
    for block in blocks_of(model):
        block.compile(backend="eager")
    torch.testing.assert_close(model.blocks[1](model.blocks[0](x)), expected)


def test_block_builds_on_the_meta_device():
    with torch.device("meta"):
        assert all(p.is_meta for p in stack(1, cross_dim=D_CONTEXT).parameters())


def test_block_runs_in_bfloat16_autocast():
    block, x = stack(1, cross_dim=D_CONTEXT).blocks[0], torch.randn(B, N, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x, None, torch.randn(B, M, D_CONTEXT)).isfinite().all()
